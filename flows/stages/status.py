"""The status of a run's stages (done, running, failed), read from its folder."""

import time
from dataclasses import dataclass
from pathlib import Path

from data_scoring.base.progress import read_progress
from flows.run.folder import Run, read_run
from flows.run.locks import is_locked
from flows.stages.stage_order import Step, is_complete, steps_of
from trainer.checkpoint_folder import list_checkpoints, read_checkpoint_record
from trainer.rank_errors import root_cause


@dataclass(frozen=True)
class StageStatus:
    """The status of a stage: `state` is done, running, failed, stopped or waiting; `detail` says how far or why."""

    name: str
    state: str
    detail: str


def read_status(folder: Path) -> list[StageStatus]:
    """Return the status of all stages of the run in `folder`, in order."""
    return status_of(read_run(folder))


def status_of(run: Run) -> list[StageStatus]:
    """Return the status of all stages of `run`, in order."""
    rows: list[StageStatus] = []
    not_done: list[Step] = []
    for step in steps_of(run.config):
        row = _step_status(run, step, not_done)
        rows.append(row)
        if row.state != "done":
            not_done.append(step)
    return rows


def resumption(run: Run) -> str | None:
    """Return where a run goes on: its first stage that is not done, and its last checkpoint; None if all are done."""
    for step, row in zip(steps_of(run.config), status_of(run), strict=True):
        if row.state != "done":
            saved = _saved(run, step.stage.name, step.round_number)
            return f"{row.name}, {saved}" if saved else row.name
    return None


def is_done(folder: Path) -> bool:
    """Return whether all stages of the run in `folder` are done."""
    return all(row.state == "done" for row in read_status(folder))


def _step_status(run: Run, step: Step, not_done: list[Step]) -> StageStatus:
    """Return the status of a step; `not_done` are the earlier steps that are not done."""
    stage, number = step.stage, step.round_number
    # Earlier steps that no later step needs may still be open.
    is_possible = not any(each.stage.is_needed(run.config) for each in not_done)
    if is_possible and is_complete(run, stage.name, number):
        return StageStatus(step.name, "done", _duration(run, stage.name, number))
    if not_done:
        return StageStatus(step.name, "waiting", "")
    if is_locked(run.folder):
        return StageStatus(step.name, "running", _progress(run))
    waits_for = stage.waits_for(run, number)
    if waits_for is not None:
        return StageStatus(step.name, "waiting", f"for {waits_for}")
    error = root_cause(run.folder / "logs" / "errors")
    if error is not None:
        return StageStatus(step.name, "failed", f"{error.message} (log: {run.folder / 'logs'})")
    return StageStatus(step.name, "stopped", _saved(run, stage.name, number))


def _duration(run: Run, stage: str, number: int) -> str:
    record = run.completion(stage, number) if number else None
    return f"{record['seconds']:,.0f} s" if record else ""


def _progress(run: Run) -> str:
    path = run.folder / "logs" / "progress.json"
    progress = read_progress(path)
    if progress is None or time.time() - path.stat().st_mtime > 60:
        return ""
    return f"{progress.what}: {progress.done:,}" + ("" if progress.total is None else f" of {progress.total:,}")


def _saved(run: Run, stage: str, number: int) -> str:
    checkpoints = list_checkpoints(run.round_folder(number) / "checkpoint") if stage == "train" else []
    if not checkpoints:
        return ""
    record = read_checkpoint_record(checkpoints[-1], "step", "num_steps")
    return f"last checkpoint at step {record['step']:,} of {record['num_steps']:,}"
