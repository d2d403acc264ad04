"""Packs: requests as prefix trees, so that tokens that many of them begin with go through the model once.

A pack is a tree of tokens in depth-first order. A token sees those on its way from the root, itself included: token i
sees token j just where j <= i <= end[j], `end[j]` being the last token below j. Its position is its depth.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from trainer.requests import Likelihood, Tokens

Integers = NDArray[np.int64]


# Packs of these sizes are tried; the one is taken of which all packs together cost least.
_BUDGETS = tuple(128 * 2**step for step in range(8))


# What a pack costs beside what its tokens cost, in tokens: calling the layers, filling the mask.
_TOKENS_A_PACK = 64


# Attention runs at about this part of the speed of matrix products.
_SPEED_OF_ATTENTION = 0.5


@dataclass(frozen=True, eq=False)
class Pack:
    """A prefix tree of n tokens, and p tokens that are predicted by some of them.

    tokens, depths, ends: [n]; nodes: [p], which token predicts; targets: [p], what it predicts; places: [p], the number
    of the prediction among all those of the requests; num_requests: how many of these the pack has.
    """

    tokens: Integers
    depths: Integers
    ends: Integers
    nodes: Integers
    targets: Integers
    places: Integers
    num_requests: int


def pack_requests(requests: Sequence[Likelihood], hidden_size: int, budget: int | None = None) -> list[Pack]:
    """Return packs of at most `budget` tokens each, or of one path where that is longer; the largest pack first.

    budget: None: the one that costs least for these requests in a model of that width. The larger it is, the fewer
    packs begin anew with what many requests share, and the more do tokens cost that see nothing of one another:
    attention takes as many operations as the layers' matrices in a pack of six times the width.
    """
    if not requests:
        return []
    paths = [request.path for request in requests]
    # Big-endian bytes are ordered as the numbers are.
    order = sorted(range(len(paths)), key=lambda number: paths[number].astype(">u4").tobytes())
    lengths = [len(paths[number]) for number in order]
    shared = [0, *(_num_shared(paths[one], paths[other]) for one, other in pairwise(order))]
    budgets = _BUDGETS if budget is None else (budget,)
    cuts = min((_cut(lengths, shared, budget) for budget in budgets), key=lambda cuts: _cost(cuts, hidden_size))
    first_places = np.cumsum([0, *(len(request.continuation) for request in requests)])
    packs = []
    for start, end, _ in cuts:
        tree = _Tree()
        for row in range(start, end):
            number = order[row]
            tree.add(paths[number], 0 if row == start else shared[row], requests[number], int(first_places[number]))
        packs.append(tree.finish())
    return sorted(packs, key=lambda pack: -len(pack.tokens))


def _num_shared(path: Tokens, other: Tokens) -> int:
    """Return how many tokens two paths begin with alike."""
    length = min(len(path), len(other))
    different = np.flatnonzero(path[:length] != other[:length])
    return int(different[0]) if len(different) else length


def _cut(lengths: Sequence[int], shared: Sequence[int], budget: int) -> list[tuple[int, int, int]]:
    """Return each pack's first path, the path after its last, and its tokens; `shared` is with the path before."""
    cuts, start, size = [], 0, 0
    for row, (length, common) in enumerate(zip(lengths, shared, strict=True)):
        # What adds nothing is in the pack already.
        if row > start and length > common and size + length - common > budget:
            cuts.append((start, row, size))
            start, size = row, 0
        size += length if row == start else length - common
    return [*cuts, (start, len(lengths), size)]


def _cost(cuts: Iterable[tuple[int, int, int]], hidden_size: int) -> float:
    """Return what packs cost, in tokens that see nothing."""
    size_p = np.array([size for _, _, size in cuts], np.float64)
    return float((_TOKENS_A_PACK + size_p + size_p**2 / (6 * hidden_size * _SPEED_OF_ATTENTION)).sum())


class _Tree:
    """A pack that is being filled, path after path."""

    def __init__(self) -> None:
        self._size = 0
        # The tokens of the last path, by their numbers in the pack.
        self._nodes = np.empty(0, np.int64)
        self._tokens: list[Tokens] = []
        self._depths: list[Integers] = []
        # Tokens below which nothing more comes, and the last token there.
        self._closed: list[tuple[Integers, int]] = []
        self._predictions: list[tuple[Integers, Tokens, Integers]] = []

    def add(self, path: Tokens, shared: int, request: Likelihood, first_place: int) -> None:
        """Add a path, of which the first `shared` tokens are those of the last one, and the request that it is of."""
        self._closed.append((self._nodes[shared:], self._size - 1))
        new = np.arange(self._size, self._size + len(path) - shared)
        self._nodes = np.concatenate([self._nodes[:shared], new])
        self._tokens.append(path[shared:])
        self._depths.append(np.arange(shared, len(path)))
        places = np.arange(first_place, first_place + len(request.continuation))
        self._predictions.append((self._nodes[len(request.context) - 1 :], request.continuation, places))
        self._size += len(new)

    def finish(self) -> Pack:
        """Return the pack."""
        ends = np.empty(self._size, np.int64)
        for nodes, last in [*self._closed, (self._nodes, self._size - 1)]:
            ends[nodes] = last
        nodes, targets, places = (np.concatenate(parts) for parts in zip(*self._predictions, strict=True))
        return Pack(
            np.concatenate(self._tokens).astype(np.int64),
            np.concatenate(self._depths),
            ends,
            nodes,
            targets.astype(np.int64),
            places,
            len(self._predictions),
        )
