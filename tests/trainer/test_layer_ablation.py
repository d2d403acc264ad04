"""Layer ablation in one pass equals running models without the layers, under every layout, with no more work."""

from typing import Any

import numpy as np
import pytest

from data_scoring.refine.training_mix import write_mix
from tests.conftest import TINY_MODEL, Ranks, read_rows
from tests.trainer.two_ranks_layers import DEEP_LAYOUTS, MICRO_BATCH_SIZE, MODEL, NUM_SAMPLES
from trainer.checkpoint_folder import list_checkpoints

Found = list[dict[str, Any]]


@pytest.mark.parametrize("layout", DEEP_LAYOUTS)
def test_losses_are_those_of_plain_models_without_the_layers(layout: str, found: Found) -> None:
    [rows] = [rank["skips"][layout]["rows"] for rank in found if rank["skips"][layout]["rows"] is not None]
    plain = found[0]["skips"]["plain"]
    num_tokens, losses = plain["num_tokens"], plain["losses"]
    assert len(set(num_tokens.tolist())) > 1
    assert [(row["start"], row["length"]) for row in rows] == list(losses)
    base = losses[0, 0]
    for row in rows:
        mine = losses[row["start"], row["length"]]
        increase = (mine - base) @ num_tokens / num_tokens.sum()
        # The textbook's variance of a ratio of two sums (Cochran 1977, 2.11), without its correction for finite sets.
        residuals = (mine - base) * num_tokens - increase * num_tokens
        variance = np.var(residuals, ddof=1) / NUM_SAMPLES / num_tokens.mean() ** 2
        assert row["loss"] == pytest.approx(mine @ num_tokens / num_tokens.sum(), abs=1e-5)
        assert row["increase"] == pytest.approx(increase, abs=1e-5)
        assert row["stderr"] == pytest.approx(np.sqrt(variance), abs=1e-5)
    increases = [row["increase"] for row in rows if row["length"]]
    assert np.ptp(increases) > 0.05
    assert rows[0]["increase"] == rows[0]["stderr"] == 0


def test_losses_in_bfloat16_are_about_the_same(found: Found) -> None:
    exact, rounded = (found[1]["skips"][name]["rows"] for name in ("pipeline", "bfloat16"))
    differences = [abs(one["loss"] - other["loss"]) for one, other in zip(exact, rounded, strict=True)]
    assert 1e-5 < max(differences) < 0.03


@pytest.mark.parametrize(
    ("layout", "replicas", "tensor"),
    [("data", 2, 1), ("pipeline", 1, 1), ("interleaved", 1, 1), ("sequence", 1, 2)],
)
def test_no_layer_sees_a_sample_again_that_a_cache_could_know(
    layout: str, replicas: int, tensor: int, found: Found
) -> None:
    """Every layer sees a sample once in the whole model, and once for every block that has ended before it."""
    blocks = [(start, end) for start in range(4) for end in range(start + 1, min(start + 3, 4) + 1)]
    per_sample = MODEL.num_layers + sum(MODEL.num_layers - end for _, end in blocks)
    assert per_sample == 14
    at_once = MICRO_BATCH_SIZE * replicas
    # The last batch is filled up.
    num_rows = -(-NUM_SAMPLES // at_once) * at_once
    assert sum(rank["skips"][layout]["rows through layers"] for rank in found) == tensor * num_rows * per_sample


@pytest.mark.slow
def test_jobs_of_four_ranks_measure_what_one_does(ranks: Ranks) -> None:
    """Of stages of one layer each, blocks of three layers cross two borders."""
    model = TINY_MODEL.model_copy(update={"num_layers": 4})
    some = f"select shard, sample from '{ranks.corpus.samples_path}' where sample < 40"
    trained = ranks.train("four-layers", make_mix=lambda path: write_mix(path, some, 0, 1), model=model)
    weights = list_checkpoints(trained / "checkpoint")[-1]
    one, *others = (
        read_rows(
            ranks.skip(f"skips-{number}", weights, layout, model), "start", "length", "loss", "increase", "stderr"
        )
        for number, layout in enumerate([(1, 1, 1), (1, 4, 1), (2, 2, 1)])
    )
    for rows in others:
        np.testing.assert_allclose(rows, one, atol=1e-5)
