"""A seeded random permutation of 0..n-1 in constant memory: a Feistel network with cycle walking."""

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6


def mix_bits(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return `values` hashed to uniform 64-bit numbers (SplitMix64 finaliser, Steele et al. 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Permutation:
    """A bijection of 0..size-1 fixed by `seed`; both directions are vectorised."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self._half_bits = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
        self._half_mask = np.uint64((1 << int(self._half_bits)) - 1)
        self._keys = mix_bits(np.arange(_ROUNDS, dtype=np.uint64) ^ (np.uint64(seed) << np.uint64(8)))

    def forward(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the places, int64, that the indices `index` map to."""
        return self._walk(index, reverse=False)

    def inverse(self, place: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the indices, int64, that map to `place`."""
        return self._walk(place, reverse=True)

    def _walk(self, values: NDArray[np.int64], reverse: bool) -> NDArray[np.int64]:
        # The network permutes a range whose length is a power of four, at most four times the size. Repeating it until
        # the value is inside 0..size-1 restricts it to a bijection of that range.
        result = self._network(np.asarray(values).astype(np.uint64), reverse)
        while (outside := result >= np.uint64(self.size)).any():
            result[outside] = self._network(result[outside], reverse)
        return result.astype(np.int64)

    def _network(self, values: NDArray[np.uint64], reverse: bool) -> NDArray[np.uint64]:
        left, right = values >> self._half_bits, values & self._half_mask
        for key in self._keys[::-1] if reverse else self._keys:
            if reverse:
                left, right = right ^ (mix_bits(left ^ key) & self._half_mask), left
            else:
                left, right = right, left ^ (mix_bits(right ^ key) & self._half_mask)
        return (left << self._half_bits) | right
