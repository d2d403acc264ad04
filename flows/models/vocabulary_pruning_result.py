"""The request for a pruned vocabulary, and its result."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_scoring.corpus.token_counts import SourceCounts, SourceLength
from data_scoring.tokenizer.token_coverage import Choice, Curve
from trainer.config import ModelConfig

# Coverage of the paper's vocabulary of 48,000 tokens on its corpus (section 3.1).
PAPER_COVERAGE = 0.9786


@dataclass(frozen=True)
class Request:
    """A request for a pruned vocabulary, with `size`, `coverage` or neither; with neither, a size is recommended."""

    tokenizer: Path
    corpus: Path
    size: int | None = None
    coverage: float | None = None
    output: Path | None = None
    model: ModelConfig | None = None
    checkpoint: Path | None = None
    end_of_document: str | None = None


@dataclass(frozen=True)
class PrunedVocabulary:
    """A pruned vocabulary: what it was cut from, which tokens it keeps, its costs, and its files."""

    folder: Path
    tokenizer: Path
    pieces: list[str | None]
    counts: NDArray[np.int64]
    sources: list[SourceCounts]
    curve: Curve
    choice: Choice
    lengths: list[SourceLength]
    model: ModelConfig
    paper_size: int
    cheapest: int
    reason: str

    def share(self, size: int) -> float:
        """Return the share of the model's parameters in embedding and head with a vocabulary of `size`."""
        return self.model.embedding_share(size)

    def parameters(self) -> NDArray[np.float64]:
        """Return the model's number of parameters at each size of the curve."""
        return parameters_at(self.model, self.curve)

    def coverage(self, size: int) -> float:
        """Return the share of the corpus's tokens that a vocabulary of `size` keeps."""
        if size == len(self.choice.tokens):
            return float(self.counts[self.choice.tokens].sum() / self.counts.sum())
        return float(self.curve.coverage[size - self.curve.sizes[0]])

    def length(self, size: int) -> float:
        """Return the estimated number of tokens of the corpus with a vocabulary of `size`, relative to before."""
        return float(self.curve.lengths[size - self.curve.sizes[0]])


def parameters_at(model: ModelConfig, curve: Curve) -> NDArray[np.float64]:
    """Return the number of parameters of `model` at each size of `curve`."""
    fixed, per_token = model.num_parameters(0), model.num_parameters(1) - model.num_parameters(0)
    return fixed + per_token * curve.sizes.astype(np.float64)


def dropped_tokens(made: PrunedVocabulary) -> list[int]:
    """Return the dropped tokens, the most frequent first."""
    kept = set(made.choice.tokens)
    dropped = [token for token, piece in enumerate(made.pieces) if piece is not None and token not in kept]
    return sorted(dropped, key=lambda token: -int(made.counts[token]))
