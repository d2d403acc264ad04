"""Prefix trees: requests merged by common prefixes, so that the model processes each prefix once.

A tree stores its tokens in depth-first order. A token attends to its ancestors and itself: token i attends to token j
if j <= i <= end[j], where `end[j]` is the last token below j. Its position is its depth.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from trainer.requests import Likelihood, Tokens

Integers = NDArray[np.int64]

# Tree sizes to try, in tokens; the one with the least total cost is used.
_BUDGETS = tuple(128 * 2**step for step in range(8))
# A tree's fixed cost (calling the layers, filling the mask), in units of a token's cost.
_TOKENS_A_TREE = 64
# Speed of attention relative to matrix products, approximately.
_SPEED_OF_ATTENTION = 0.5


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """A prefix tree of n tokens, with p predictions.

    tokens, depths, ends: [n]; nodes: [p], the token that predicts; targets: [p], the token to predict; places: [p], the
    prediction's index among those of all requests; num_requests: the number of requests in the tree.
    """

    tokens: Integers
    depths: Integers
    ends: Integers
    nodes: Integers
    targets: Integers
    places: Integers
    num_requests: int

    def padded(self, multiple: int) -> "PrefixTree":
        """Return the tree with its numbers of tokens and of predictions rounded up to multiples of `multiple`.

        Padding tokens follow the others, see only themselves and are seen by no other. Padding predictions follow the
        others, and have no places.
        """
        size, num_padding = len(self.tokens), -len(self.tokens) % multiple
        more = np.zeros(num_padding, np.int64)
        none = np.zeros(-len(self.nodes) % multiple, np.int64)
        return replace(
            self,
            tokens=np.concatenate([self.tokens, more]),
            depths=np.concatenate([self.depths, more]),
            ends=np.concatenate([self.ends, np.arange(size, size + num_padding)]),
            nodes=np.concatenate([self.nodes, none]),
            targets=np.concatenate([self.targets, none]),
        )


def build_prefix_trees(requests: Sequence[Likelihood], hidden_size: int, budget: int | None = None) -> list[PrefixTree]:
    """Return trees of at most `budget` tokens each, or of a single longer path; the largest tree first.

    budget: None: the one with the least cost for these requests and this width. With a larger budget, fewer trees
    repeat shared prefixes, but attention costs more, since it is computed between unrelated tokens too: in a tree of
    six times the width, it takes as many operations as the layers' matrices.
    """
    if not requests:
        return []
    paths = [request.path for request in requests]
    # Big-endian bytes sort like the numbers.
    order = sorted(range(len(paths)), key=lambda number: paths[number].astype(">u4").tobytes())
    lengths = [len(paths[number]) for number in order]
    shared = [0, *(_num_shared(paths[one], paths[other]) for one, other in pairwise(order))]
    budgets = _BUDGETS if budget is None else (budget,)
    cuts = min((_cut(lengths, shared, budget) for budget in budgets), key=lambda cuts: _cost(cuts, hidden_size))
    first_places = np.cumsum([0, *(len(request.continuation) for request in requests)])
    trees = []
    for start, end, _ in cuts:
        growing = _GrowingTree()
        for row in range(start, end):
            number = order[row]
            growing.add(paths[number], 0 if row == start else shared[row], requests[number], int(first_places[number]))
        trees.append(growing.finish())
    return sorted(trees, key=lambda tree: -len(tree.tokens))


def _num_shared(path: Tokens, other: Tokens) -> int:
    """Return the length of the common prefix of two paths."""
    length = min(len(path), len(other))
    different = np.flatnonzero(path[:length] != other[:length])
    return int(different[0]) if len(different) else length


def _cut(lengths: Sequence[int], shared: Sequence[int], budget: int) -> list[tuple[int, int, int]]:
    """Return each tree's first path, end path (exclusive) and size; `shared`: tokens shared with the previous path."""
    cuts, start, size = [], 0, 0
    for row, (length, common) in enumerate(zip(lengths, shared, strict=True)):
        # A path that is entirely in the tree already never starts a new one.
        if row > start and length > common and size + length - common > budget:
            cuts.append((start, row, size))
            start, size = row, 0
        size += length if row == start else length - common
    return [*cuts, (start, len(lengths), size)]


def _cost(cuts: Iterable[tuple[int, int, int]], hidden_size: int) -> float:
    """Return the cost of trees, in units of a token's cost without attention."""
    size_p = np.array([size for _, _, size in cuts], np.float64)
    return float((_TOKENS_A_TREE + size_p + size_p**2 / (6 * hidden_size * _SPEED_OF_ATTENTION)).sum())


class _GrowingTree:
    """A tree under construction, filled path by path."""

    def __init__(self) -> None:
        self._size = 0
        # Indices in the tree of the last path's tokens.
        self._nodes = np.empty(0, np.int64)
        self._tokens: list[Tokens] = []
        self._depths: list[Integers] = []
        # Tokens whose subtrees are complete, and the last token of these subtrees.
        self._closed: list[tuple[Integers, int]] = []
        self._predictions: list[tuple[Integers, Tokens, Integers]] = []

    def add(self, path: Tokens, shared: int, request: Likelihood, first_place: int) -> None:
        """Add a path, whose first `shared` tokens are those of the last one, and its request."""
        self._closed.append((self._nodes[shared:], self._size - 1))
        new = np.arange(self._size, self._size + len(path) - shared)
        self._nodes = np.concatenate([self._nodes[:shared], new])
        self._tokens.append(path[shared:])
        self._depths.append(np.arange(shared, len(path)))
        places = np.arange(first_place, first_place + len(request.continuation))
        self._predictions.append((self._nodes[len(request.context) - 1 :], request.continuation, places))
        self._size += len(new)

    def finish(self) -> PrefixTree:
        """Return the tree."""
        ends = np.empty(self._size, np.int64)
        for nodes, last in [*self._closed, (self._nodes, self._size - 1)]:
            ends[nodes] = last
        nodes, targets, places = (np.concatenate(parts) for parts in zip(*self._predictions, strict=True))
        return PrefixTree(
            np.concatenate(self._tokens).astype(np.int64),
            np.concatenate(self._depths),
            ends,
            nodes,
            targets.astype(np.int64),
            places,
            len(self._predictions),
        )
