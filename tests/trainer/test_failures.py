"""Failures that stop a job, and the state that they leave behind."""

import itertools
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.plain_model import read_checkpoint
from tests.conftest import Ranks, read_rows
from tests.forked_ranks import run_ranks
from trainer.checkpoint_folder import list_checkpoints, read_checkpoint_record, seal_checkpoint
from trainer.config import CheckpointConfig
from trainer.job import read_job, write_job
from trainer.stopping import StopRequest


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


def work(rank: int, folder: Path, job: Path) -> None:
    """Train until a gradient of step 3 is not a number, and leave the error in `folder`."""
    from trainer.devices import initialise
    from trainer.rank import do

    store = torch.distributed.FileStore(str(folder / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=1)
    device = initialise("cpu", 0)
    from trainer import train

    update_weights, steps, threads = train.update_weights, itertools.count(1), set(threading.enumerate())

    def spoil(optimizer: Any, device: torch.device) -> torch.Tensor:
        if next(steps) == 3:
            optimizer.chained_optimizers[0].buffers[0].grad_data[7] = torch.nan
        return update_weights(optimizer, device)

    train.update_weights = spoil
    with pytest.raises(ValueError, match="gradient") as error:
        do(read_job(job), device, StopRequest())
    for thread in set(threading.enumerate()) - threads:
        thread.join(600)
        assert not thread.is_alive()
    (folder / "error").write_text(str(error.value), encoding="utf-8")


def test_a_gradient_that_is_not_finite_reaches_no_checkpoint(ranks: Ranks, trained: Path, tmp_path: Path) -> None:
    """The weights are updated with it, while the checkpoint of the step before is still being written."""
    checkpoint = CheckpointConfig(every_steps=1, keep_last=2, asynchronous="always")
    job = ranks.job("spoiled", checkpoint=checkpoint)
    job.round_folder.mkdir()
    shutil.copy(trained / "mix.parquet", job.round_folder)
    write_job(job, tmp_path / "spoiled.job.json")
    run_ranks(work, tmp_path, tmp_path / "spoiled.job.json", num_ranks=1)
    error = (tmp_path / "error").read_text(encoding="utf-8")
    assert error.startswith(
        f"{job.round_folder}: the gradient's norm at step 3 is nan; training stopped and step-00000002"
    )
    kept = list_checkpoints(job.round_folder / "checkpoint")
    assert [path.name for path in kept] == ["step-00000001", "step-00000002"]
    assert all(bool(weight.isfinite().all()) for path in kept for weight in read_checkpoint(path).values())
    ranks.train("spoiled")
    for file, names in (("steps.parquet", ("step", "loss", "grad_norm")), ("seen", ("step", "sample", "loss"))):
        assert read_rows(job.round_folder / file, *names) == read_rows(trained / file, *names)


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
