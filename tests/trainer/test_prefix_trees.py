"""Prefix trees: attention masks, positions, predictions, and the number of tokens saved."""

import numpy as np
import pytest

from trainer.prefix_trees import PrefixTree, build_prefix_trees
from trainer.requests import Likelihood


def make(*pairs: tuple[list[int], list[int]]) -> list[Likelihood]:
    return [Likelihood(np.array(a, np.int32), np.array(b, np.int32)) for a, b in pairs]


def draw(seed: int, count: int) -> list[Likelihood]:
    """Return requests over three tokens only, so that they share all that can be shared."""
    generator = np.random.default_rng(seed)
    return make(
        *(
            tuple(generator.integers(0, 3, generator.integers(1, 9)).tolist() for _ in range(2))  # type: ignore[misc]
            for _ in range(count)
        )
    )


def ancestors(tree: PrefixTree) -> list[list[int]]:
    """Return each token's way from the root, itself included, from depths alone."""
    ways: list[list[int]] = []
    for number, depth in enumerate(tree.depths):
        ways.append([*(ways[number - 1][:depth] if number else []), number])
    return ways


@pytest.mark.parametrize("multiple", [1, 64])
def test_padding_sees_itself_alone_and_is_seen_by_none(multiple: int) -> None:
    for tree in build_prefix_trees(draw(1, 60), 8, 100):
        padded = tree.padded(multiple)
        size = len(tree.tokens)
        for name in ("tokens", "depths", "ends", "nodes", "targets"):
            before, after = getattr(tree, name), getattr(padded, name)
            assert np.array_equal(after[: len(before)], before)
            assert len(after) % multiple == 0 and len(after) - len(before) < multiple
        assert np.array_equal(padded.places, tree.places)
        number_n = np.arange(len(padded.tokens))
        sees = (number_n[None, :] <= number_n[:, None]) & (number_n[:, None] <= padded.ends[None, :])
        assert np.array_equal(sees[size:], np.eye(len(number_n), dtype=bool)[size:])
        assert not sees[:size, size:].any()


@pytest.mark.parametrize("budget", [1, 20, 60, 10_000])
def test_a_token_sees_its_way_from_the_root_and_predicts_what_was_asked(budget: int) -> None:
    requests = draw(0, 80)
    trees = build_prefix_trees(requests, 8, budget)
    # Each prediction once: the tokens that it sees are the request's own, up to there.
    expected = [
        ([*map(int, request.context), *map(int, request.continuation[:number])], int(token))
        for request in requests
        for number, token in enumerate(request.continuation)
    ]
    found: dict[int, tuple[list[int], int]] = {}
    for tree in trees:
        ways = ancestors(tree)
        number_n = np.arange(len(tree.tokens))
        sees = (number_n[None, :] <= number_n[:, None]) & (number_n[:, None] <= tree.ends[None, :])
        for row, way in zip(sees, ways, strict=True):
            assert np.flatnonzero(row).tolist() == way
        assert [len(way) - 1 for way in ways] == tree.depths.tolist()
        for node, target, place in zip(tree.nodes, tree.targets, tree.places, strict=True):
            assert int(place) not in found
            found[int(place)] = (tree.tokens[ways[node]].tolist(), int(target))
    assert [found[place] for place in range(len(expected))] == expected
    assert sum(tree.num_requests for tree in trees) == len(requests)
    sizes = [len(tree.tokens) for tree in trees]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) <= max(budget, *(len(request.path) for request in requests))


def test_what_requests_share_is_in_a_pack_once() -> None:
    requests = draw(1, 200)
    [tree] = build_prefix_trees(requests, 8, 10_000)
    prefixes = {tuple(request.path[:end]) for request in requests for end in range(1, len(request.path) + 1)}
    assert len(tree.tokens) == len(prefixes)
    # Twelve questions of five tokens after a hundred of examples, four options of three each, of which two are read.
    shots, generator = list(range(10, 110)), np.random.default_rng(2)
    questions = [[*shots, 200 + number, *generator.integers(0, 9, 4).tolist()] for number in range(12)]
    options = make(*((question, [300 + option, 1, 2]) for question in questions for option in range(4)))
    [tree] = build_prefix_trees(options, 8, 10_000)
    assert len(tree.tokens) == 100 + 12 * (5 + 4 * 2)
    assert sum(len(request.path) for request in options) == 12 * 4 * (100 + 5 + 2)


def test_packs_are_longer_where_more_is_shared_and_where_the_model_is_wider() -> None:
    generator = np.random.default_rng(3)

    def largest(num_shared: int, hidden_size: int) -> int:
        shared = generator.integers(0, 9, num_shared).tolist()
        requests = make(*(([*shared, *generator.integers(10, 99, 30).tolist()], [1]) for _ in range(400)))
        return len(build_prefix_trees(requests, hidden_size)[0].tokens)

    assert largest(0, 128) < largest(500, 128) < largest(500, 4096)


def test_no_requests_make_no_packs() -> None:
    assert build_prefix_trees([], 8) == []
