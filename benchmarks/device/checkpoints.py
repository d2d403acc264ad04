"""Checkpoints of 1 B parameters: saving, loading, saving during training, and saving on a stop request."""

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from benchmarks.device.large_model import Steps
from benchmarks.device.record import Record
from benchmarks.device.settings import Place
from benchmarks.device.small_model import training_job
from benchmarks.measure import single_rank
from flows.launch.launcher import launch
from trainer.checkpoint_folder import find_damage, list_checkpoints, read_checkpoint_record, seconds_to_stop
from trainer.memory import checkpoint_bytes

_MICRO_BATCH = 2
# Enough steps for all buffers to be allocated.
_STEPS_BEFORE_STOPPING = 3
_MIXES = 500
# Tolerance for kernels with nondeterministic summation order; the difference grows with every step.
_SAME_LOSS = 1e-3


def check_checkpoints(place: Place, record: Record) -> None:
    """Save and load the training state, and check that training continues identically after loading."""
    from trainer.checkpoint import load_checkpoint
    from trainer.saver import CheckpointSaver

    device = single_rank(place.kind)
    steps = Steps(place, device, _MICRO_BATCH)
    for _ in range(2):
        steps.step()
    folder = place.work / "saved"
    device.synchronize()
    started = time.perf_counter()
    CheckpointSaver(folder, 1, is_asynchronous=False).save(1, steps.state, {}, is_waiting=True)
    [checkpoint] = list_checkpoints(folder)
    size = _size(checkpoint)
    _record_speed(record, "saving", time.perf_counter() - started, size)
    record.figures(checkpoint_gb=size / 1e9)
    expected = [steps.step(), steps.step()]
    # Zero the state, so that anything not loaded shows.
    with torch.no_grad():
        for tensor in _tensors(steps):
            tensor.zero_()
    started = time.perf_counter()
    load_checkpoint(checkpoint, steps.state)
    device.synchronize()
    _record_speed(record, "loading", time.perf_counter() - started, size)
    for number, loss in enumerate(expected, start=1):
        what = f"loading: difference of the loss of step {number} from here, nats"
        record.check(what, abs(steps.step() - loss), _SAME_LOSS)
    _save_while_training(place, record, steps)


def _tensors(steps: Steps) -> Iterator[Tensor]:
    """Yield the weights, the optimizer's main weights and their states."""
    yield from steps.state.model.parameters()
    for optimizer in steps.state.optimizer.chained_optimizers:
        for group in optimizer.optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter
                yield from (each for each in optimizer.optimizer.state[parameter].values() if each.ndim)


def _save_while_training(place: Place, record: Record, steps: Steps) -> None:
    from trainer.saver import CheckpointSaver

    saver = CheckpointSaver(place.work / "saved", 1, is_asynchronous=True)
    steps.device.synchronize()
    started = time.perf_counter()
    saver.save(2, steps.state, {}, is_waiting=False)
    record.figures(seconds_that_saving_asynchronously_holds_training_up=time.perf_counter() - started)
    num_steps = 0
    while saver.is_writing():
        steps.step()
        num_steps += 1
    saver.finish()
    [checkpoint] = list_checkpoints(place.work / "saved")
    _record_speed(record, "saving_asynchronously", time.perf_counter() - started, _size(checkpoint))
    record.figures(steps_done_meanwhile=num_steps)
    record.check("saving asynchronously: checkpoints that are missing", int(checkpoint.name != "step-00000002"), 0)


def _size(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())


def _record_speed(record: Record, what: str, seconds: float, size: int) -> None:
    record.figures(**{f"{what}_seconds": seconds, f"{what}_gb_per_second": size / 1e9 / seconds})


class _EnoughError(Exception):
    """Training has reached the step at which to stop."""


@dataclass
class _StopAfter:
    """A progress callback that makes the launcher stop after `num_steps`, and records when."""

    num_steps: int
    told_at: float = 0.0
    done: int = 0

    def __call__(self, what: str, done: int, total: int | None) -> None:
        if what.startswith("training") and done >= self.num_steps:
            self.told_at, self.done = time.perf_counter(), done
            raise _EnoughError


def check_stopping(place: Place, record: Record) -> None:
    """Let the launcher stop training with SIGTERM to torchrun, and measure the time until everything is saved."""
    model = place.sizes.large
    seconds = seconds_to_stop(checkpoint_bytes(model.num_parameters(int(model.vocab_size or 0)), "bfloat16"))
    job = training_job(place, "stopped", "bfloat16", model=model).model_copy(update={"seconds_to_stop": seconds})
    mix = pq.read_table(place.prepared / "mix.parquet")
    # Long enough not to finish before the stop request.
    pq.write_table(pa.concat_tables([mix] * _MIXES), job.round_folder / "mix.parquet")
    stop = _StopAfter(_STEPS_BEFORE_STOPPING)
    with suppress(_EnoughError):
        launch(job, place.output, "stopped", stop)
    measured = time.perf_counter() - stop.told_at
    checkpoints = list_checkpoints(job.round_folder / "checkpoint")
    record.check("stopping: checkpoints that are missing", abs(1 - len(checkpoints)), 0)
    if not checkpoints:
        raise ValueError(f"no checkpoint was saved in {measured:.0f} s; torch before 2.13 ends ranks after 30 s")
    size = _size(checkpoints[-1])
    _record_speed(record, "from_sigterm_to_the_end_of_all_ranks", measured, size)
    record.check("stopping: seconds until all ranks ended", measured, seconds)
    saved = int(read_checkpoint_record(checkpoints[-1])["step"])
    record.figures(step_when_told=stop.done, step_saved=saved)
    record.check("stopping: steps that are lost", max(0, stop.done - saved), 0)
    started = time.perf_counter()
    damage = find_damage(checkpoints[-1])
    record.figures(checksums_seconds=time.perf_counter() - started)
    record.check(f"stopping: damaged files ({damage or 'none'})", int(damage is not None), 0)
