"""Draws follow the distribution that transformers' own processors leave, and depend on seed and key alone."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from trainer.sampling import Sampler, Sampling

LOGITS = np.random.default_rng(3).normal(0, 1, 12)


@pytest.mark.parametrize(
    "settings", [{"temperature": 1.0}, {"temperature": 0.5}, {"temperature": 1.5, "top_k": 5},
                 {"temperature": 1.0, "top_p": 0.8}, {"temperature": 2.0, "top_k": 8, "top_p": 0.6},
                 {"temperature": 1.0, "top_k": 100, "top_p": 1.0}],
)  # fmt: skip
def test_draws_follow_the_distribution_of_transformers(settings: dict[str, float]) -> None:
    sampler = Sampler(Sampling(**settings), (0, 0))
    counts = np.bincount([sampler.choose(LOGITS) for _ in range(5_000)], minlength=12)
    scores = torch.from_numpy(LOGITS)[None]
    scores = TemperatureLogitsWarper(settings["temperature"])(None, scores)
    if "top_k" in settings:
        scores = TopKLogitsWarper(int(settings["top_k"]))(None, scores)
    if "top_p" in settings:
        scores = TopPLogitsWarper(settings["top_p"])(None, scores)
    expected = scores.softmax(dim=-1)[0].numpy()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert chisquare(counts[possible], expected[possible] * 5_000).pvalue > 0.001


def test_temperature_zero_is_greedy() -> None:
    assert {Sampler(Sampling(), (0, key)).choose(LOGITS) for key in range(9)} == {int(LOGITS.argmax())}


@pytest.mark.parametrize("temperature", [1e-3, 1e-300, 5e-324])
@pytest.mark.parametrize("more", [{}, {"top_k": 2}, {"top_p": 0.9}])
@pytest.mark.filterwarnings("error")
def test_the_smallest_temperatures_are_greedy(temperature: float, more: dict[str, float]) -> None:
    logits = np.array([0.0, 1e4, -1e4, 9.9e3])
    assert Sampler(Sampling(temperature=temperature, **more), (0, 0)).choose(logits) == 1


def test_draws_depend_on_seed_and_key_alone() -> None:
    def draw(seed: int, key: tuple[int, int]) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), key)
        return [sampler.choose(LOGITS) for _ in range(30)]

    assert draw(1, (0, 0)) == draw(1, (0, 0))
    assert len({tuple(draw(seed, key)) for seed in (1, 2) for key in ((0, 0), (0, 1), (1, 0))}) == 6
