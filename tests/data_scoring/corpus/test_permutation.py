import numpy as np
import pytest
from scipy.stats import chisquare

from data_scoring.corpus.permutation import Permutation


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 65_537])
def test_it_is_a_bijection_and_inverse_undoes_it(size: int) -> None:
    permutation = Permutation(size, seed=3)
    index = np.arange(size)
    places = permutation.forward(index)
    assert sorted(places.tolist()) == index.tolist()
    assert (permutation.inverse(places) == index).all()


def test_places_are_uniform_over_seeds() -> None:
    places = np.array([Permutation(10, seed).forward(np.arange(10)) for seed in range(5000)])
    for index in range(10):
        assert chisquare(np.bincount(places[:, index], minlength=10)).pvalue > 1e-4


def test_shards_mix_neighbours() -> None:
    """The shard of a sample says nothing about its neighbour's: all pairs are about as frequent."""
    shards = Permutation(80_000, 5).forward(np.arange(80_000)) % 8
    pairs = np.bincount(shards[:-1] * 8 + shards[1:], minlength=64)
    assert chisquare(pairs).pvalue > 1e-4
