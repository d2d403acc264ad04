"""Failures that stop a job, and the state that they leave behind."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks.plain_model import read_checkpoint
from tests.conftest import Ranks
from trainer.checkpoint_folder import list_checkpoints, read_checkpoint_record, seal_checkpoint


@pytest.fixture(scope="module")
def diverged(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose last norm is not a number."""
    checkpoint = Path(
        shutil.copytree(list_checkpoints(trained / "checkpoint")[-1], tmp_path_factory.mktemp("nan") / "step-00000001")
    )
    weights = read_checkpoint(checkpoint)["decoder.final_layernorm.weight"].numpy()
    found = 0
    for part in checkpoint.glob("*.distcp"):
        content = part.read_bytes()
        found += content.count(weights.tobytes())
        part.write_bytes(content.replace(weights.tobytes(), np.full_like(weights, np.nan).tobytes()))
    assert found
    seal_checkpoint(checkpoint, read_checkpoint_record(checkpoint))
    return checkpoint


def test_a_loss_that_is_not_finite_stops_training_and_saves_nothing(ranks: Ranks, diverged: Path) -> None:
    with pytest.raises(
        ValueError, match=r"the loss at step 1 is nan; training stopped .*lower train.lr.*\(log: .*\.log\)"
    ):
        ranks.train("not-finite", start_from=diverged)
    assert list_checkpoints(ranks.folder / "not-finite" / "checkpoint") == []


def test_a_loss_that_is_not_finite_stops_scoring(ranks: Ranks, diverged: Path) -> None:
    with pytest.raises(ValueError, match=r"shard=0000.parquet: sample 0 of shard 0 has the loss nan \(\d+ in all"):
        ranks.score("not-finite-score", diverged)
    assert list((ranks.folder / "not-finite-score" / "losses").iterdir()) == []


def test_a_damaged_checkpoint_is_named(ranks: Ranks, trained: Path, tmp_path: Path) -> None:
    checkpoint = list_checkpoints(trained / "checkpoint")[-1]
    copy = Path(shutil.copytree(checkpoint, tmp_path / "step-00000001"))
    for part in copy.glob("*.distcp"):
        part.write_bytes(part.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"step-00000001: cannot be loaded \(it is damaged: __0_0.distcp has 1,000 b"):
        ranks.score("damaged-checkpoint", copy)
