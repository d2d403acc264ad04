"""Losses in float32 stay what version 0.9.0 gave, whatever is done for speed: `recorded_losses.json` was written by it.

It holds the losses of a round's steps, its validation, and the losses of all samples under its model, in nats.
"""

import json
from pathlib import Path

import numpy as np

from tests.conftest import read_rows

_RECORDED: dict[str, list[float]] = json.loads(Path(__file__).with_name("recorded_losses.json").read_text())
# Roundings of a step add up over the steps after it.
_TOLERANCE = 1e-5


def test_training_gives_the_recorded_losses(trained: Path) -> None:
    losses = [row[1] for row in read_rows(trained / "steps.parquet", "step", "loss")]
    np.testing.assert_allclose(losses, _RECORDED["steps"], rtol=0, atol=_TOLERANCE)
    norms = [row[1] for row in read_rows(trained / "steps.parquet", "step", "grad_norm")]
    np.testing.assert_allclose(norms, _RECORDED["grad_norms"], rtol=1e-4)
    validation = [row[2] for row in read_rows(trained / "validation.parquet", "step", "source", "loss")]
    np.testing.assert_allclose(validation, _RECORDED["validation"], rtol=0, atol=_TOLERANCE)


def test_scoring_gives_the_recorded_losses(scored: Path) -> None:
    losses = [
        row[1] for shard in sorted((scored / "losses").glob("*.parquet")) for row in read_rows(shard, "sample", "loss")
    ]
    np.testing.assert_allclose(losses, _RECORDED["scores"], rtol=0, atol=_TOLERANCE)
