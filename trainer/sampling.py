"""Choosing the next token from logits: the most probable one, or a draw by temperature, top-k and top-p.

The settings mean what they mean in transformers, and are applied in its order: temperature, top-k, top-p.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from data_scoring.base.field_types import Integer
from data_scoring.config import Config


class Sampling(Config):
    """How the next token is chosen."""

    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="0: the most probable token.")
    top_k: Integer | None = Field(default=None, ge=1, description="Draw from the k most probable tokens only.")
    top_p: float | None = Field(
        default=None, gt=0, le=1, description="Draw from the fewest tokens whose probabilities add up to this."
    )
    seed: Integer = Field(default=0, ge=0, description="Seed of the draws.")


class Sampler:
    """Draws the tokens of one continuation. Its draws depend on the seed and on `key` alone, not on other sequences."""

    def __init__(self, sampling: Sampling, key: Sequence[int]) -> None:
        self._sampling = sampling
        self._generator = np.random.default_rng([sampling.seed, *key])

    def choose(self, logits_v: NDArray[np.float64]) -> int:
        """Return the next token, given the logits of the vocabulary, [v]."""
        sampling = self._sampling
        if sampling.temperature == 0:
            return int(logits_v.argmax())
        order_v = np.argsort(-logits_v, kind="stable")[: sampling.top_k]
        logits_k = logits_v[order_v]
        # The difference first: logits over a tiny temperature are infinite, and so are their differences from it.
        with np.errstate(over="ignore"):
            weight_k = np.exp((logits_k - logits_k[0]) / sampling.temperature)
        total_k = weight_k.cumsum() / weight_k.sum()
        if sampling.top_p is not None:
            # The token with which the sum reaches top_p is included.
            total_k = total_k[: int(np.searchsorted(total_k, sampling.top_p)) + 1]
        place = int(np.searchsorted(total_k, self._generator.random() * total_k[-1], side="right"))
        return int(order_v[min(place, len(total_k) - 1)])
