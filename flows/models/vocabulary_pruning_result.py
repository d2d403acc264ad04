"""The request for a pruned vocabulary, and its result."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_scoring.corpus.token_counts import SourceCounts, SourceLength
from data_scoring.tokenizer.token_coverage import Choice, Curve
from trainer.config import ModelConfig

# Coverage of the paper's vocabulary of 48,000 tokens on its corpus ("Compact Tokenizer").
PAPER_COVERAGE = 0.9786
# The paper's rule: a vocabulary covers more than this of the corpus, with less than this of the parameters.
RULE_COVERAGE, RULE_SHARE = 0.9, 0.2
RULE = f"coverage above {RULE_COVERAGE:.0%}, embedding and head below {RULE_SHARE:.0%} of the parameters"


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
    within_rule: tuple[int, int] | None  # the least and the largest size that keep `RULE`
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

    def broken_rules(self, size: int) -> list[str]:
        """Return which parts of the paper's rule a vocabulary of `size` breaks: coverage, share."""
        broken = {"coverage": self.coverage(size) <= RULE_COVERAGE, "share": self.share(size) >= RULE_SHARE}
        return [part for part, is_broken in broken.items() if is_broken]

    def warnings(self) -> list[str]:
        """Return a sentence for each part of the paper's rule that the vocabulary breaks, with what that costs."""
        size = len(self.choice.tokens)
        found = {
            "coverage": f"{size:,} tokens cover {self.coverage(size):.2%} of the corpus, not more than "
            f"{RULE_COVERAGE:.0%}: {self._longer()}, which costs as much more to train and to generate, and a sequence "
            "holds less text.",
            "share": f"embedding and head take {self.share(size):.2%} of the parameters, not less than "
            f"{RULE_SHARE:.0%}: layers would make more of them.",
        }
        return [f"Warning: outside the paper's rule: {found[part]}" for part in self.broken_rules(size)]

    def _longer(self) -> str:
        """Return how much longer the text becomes, by the source that loses most and the one that loses least."""
        growths = [
            (length.tokens_after / length.tokens_before - 1, length.name)
            for length in self.lengths
            if length.tokens_before
        ]
        if not growths:
            return f"text becomes {self.length(len(self.choice.tokens)) - 1:.1%} longer"
        (least, _), (most, name) = min(growths), max(growths)
        if len(growths) == 1:
            return f"text becomes {most:.1%} longer"
        return f"text becomes {least:.1%} to {most:.1%} longer, most of all {name}"


def parameters_at(model: ModelConfig, curve: Curve) -> NDArray[np.float64]:
    """Return the number of parameters of `model` at each size of `curve`."""
    fixed, per_token = model.num_parameters(0), model.num_parameters(1) - model.num_parameters(0)
    return fixed + per_token * curve.sizes.astype(np.float64)


def dropped_tokens(made: PrunedVocabulary) -> list[int]:
    """Return the dropped tokens, the most frequent first."""
    kept = set(made.choice.tokens)
    dropped = [token for token, piece in enumerate(made.pieces) if piece is not None and token not in kept]
    return sorted(dropped, key=lambda token: -int(made.counts[token]))
