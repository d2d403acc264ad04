"""Vocabulary pruning: which tokens to keep, coverage and cost at each size, and which size to choose."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_scoring.config import VOCABULARY_MULTIPLE, padded_vocab_size
from data_scoring.tokenizer.pieces import Vocabulary


@dataclass(frozen=True)
class Choice:
    """The kept tokens in the order of selection, and the reason for each."""

    tokens: list[int]
    reasons: dict[int, str]

    @property
    def kept(self) -> list[int]:
        """Return the kept tokens in the order of their old ids, which is the order of their new ids."""
        return sorted(self.tokens)


def choose_tokens(vocabulary: Vocabulary, counts: NDArray[np.int64], size: int) -> Choice:
    """Return the `size` tokens to keep: the required ones, then the most frequent, each after those that it needs.

    A token that no longer fits together with those it needs is skipped in favour of the next ones that fit, so there
    are exactly `size`. `counts`, [num_tokens], is how often each token occurs. Raises ValueError if `size` is less than
    the number of required tokens or more than the number of tokens.
    """
    reasons = dict(vocabulary.required)
    if size < len(reasons):
        raise ValueError(
            f"vocabulary size {size} is too small: {len(reasons)} tokens are required ({_kinds(vocabulary)}); "
            f"give {len(reasons)} or more"
        )
    num_tokens = sum(piece is not None for piece in vocabulary.pieces)
    if size > num_tokens:
        raise ValueError(f"vocabulary size {size} is more than the tokenizer's {num_tokens}; give less")
    tokens = sorted(reasons)
    for token in np.argsort(-counts, kind="stable").tolist():
        if token in reasons or vocabulary.pieces[token] is None:
            continue
        step = _missing(vocabulary, token, reasons)
        if len(tokens) + len(step) <= size:
            tokens += step
            reasons |= dict.fromkeys(step, "merge path")
            reasons[token] = "frequent" if counts[token] else "fill"
    assert len(tokens) == size, f"{len(tokens)} of {size} tokens found"
    return Choice(tokens, reasons)


def _missing(vocabulary: Vocabulary, token: int, taken: dict[int, str]) -> list[int]:
    """Return `token`, preceded by the tokens it needs that are not taken yet."""
    step: list[int] = []
    stack = [(token, False)]
    while stack:
        current, is_ready = stack.pop()
        if is_ready:
            step.append(current)
        elif current not in taken and current not in step:
            stack.append((current, True))
            stack += [(need, False) for need in vocabulary.needs[current]]
    return list(dict.fromkeys(step))


def _kinds(vocabulary: Vocabulary) -> str:
    kinds = list(vocabulary.required.values())
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))


@dataclass(frozen=True)
class Curve:
    """Coverage and text length at each vocabulary size, [num_sizes] each.

    sizes: number of kept tokens; coverage: share of the corpus's tokens, under the whole tokenizer, that are kept;
    lengths: estimated number of tokens of the corpus, relative to that under the whole tokenizer.
    """

    sizes: NDArray[np.int64]
    coverage: NDArray[np.float64]
    lengths: NDArray[np.float64]


def measure_curve(vocabulary: Vocabulary, counts: NDArray[np.int64]) -> Curve:
    """Return the coverage and length of every size from the number of required tokens upward.

    A dropped token is assumed to split into the two sides of its last merge (unigram: into the best remaining pieces),
    which split in turn when they are dropped. New merges that become possible are not considered.
    """
    num_tokens = sum(piece is not None for piece in vocabulary.pieces)
    order = choose_tokens(vocabulary, counts, num_tokens).tokens
    rank = np.full(len(vocabulary.pieces), num_tokens, np.int64)
    rank[order] = np.arange(num_tokens)
    ranks = rank.tolist()
    smallest, total = len(vocabulary.required), max(1, int(counts.sum()))
    occurrences = counts.tolist()
    lengths = np.empty(num_tokens - smallest + 1)
    length = total
    for size in range(num_tokens, smallest, -1):
        lengths[size - smallest] = length
        token = order[size - 1]
        if occurrences[token]:
            parts = vocabulary.parts(token, ranks)
            length += occurrences[token] * (len(parts) - 1)
            for part in parts:
                occurrences[part] += occurrences[token]
    lengths[0] = length
    covered = np.cumsum(counts[order])[smallest - 1 :] if smallest else np.concatenate([[0], np.cumsum(counts[order])])
    return Curve(np.arange(smallest, num_tokens + 1), covered / total, lengths / total)


def size_for_coverage(curve: Curve, coverage: float) -> int:
    """Return the smallest size whose coverage is at least `coverage`, in steps of `VOCABULARY_MULTIPLE`.

    Raises ValueError unless `coverage` is above 0 and at most 1.
    """
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage: {coverage} is not above 0 and at most 1; give a share such as 0.9786")
    # Floating-point summation may miss 1 by a rounding error.
    enough = int(np.argmax(curve.coverage >= coverage - 1e-12))
    # Embedding and head are padded to this multiple anyway, so the extra tokens cost nothing.
    return min(padded_vocab_size(int(curve.sizes[enough])), int(curve.sizes[-1]))


def cheapest_size(curve: Curve, num_parameters: NDArray[np.float64], least: int = 0, most: int | None = None) -> int:
    """Return the size with the least training cost per byte of text, in steps of `VOCABULARY_MULTIPLE`.

    `num_parameters`, [num_sizes], is that of the model at each size. The cost per byte is proportional to tokens per
    byte times parameters. least, most: the range of sizes to choose from, which holds at least one step.
    """
    costs = curve.lengths * num_parameters
    steps = _steps(curve)
    steps = steps[(curve.sizes[steps] >= least) & (curve.sizes[steps] <= (most or curve.sizes[-1]))]
    return int(curve.sizes[steps[np.argmin(costs[steps])]])


def sizes_within(curve: Curve, shares: NDArray[np.float64], coverage: float, share: float) -> tuple[int, int] | None:
    """Return the least and the largest size that cover more than `coverage` and take less than `share`, or None.

    `shares`, [num_sizes], is the share of the model's parameters in embedding and head at each size. Coverage and share
    both grow with the size. In steps of `VOCABULARY_MULTIPLE`.
    """
    steps = _steps(curve)
    within = steps[(curve.coverage[steps] > coverage) & (shares[steps] < share)]
    return (int(curve.sizes[within[0]]), int(curve.sizes[within[-1]])) if len(within) else None


def _steps(curve: Curve) -> NDArray[np.intp]:
    """Return the indices of the sizes to choose from: multiples of `VOCABULARY_MULTIPLE`, and the largest."""
    return np.flatnonzero((curve.sizes % VOCABULARY_MULTIPLE == 0) | (curve.sizes == curve.sizes[-1]))
