"""The status of runs and their stages (done, running, failed), read from their folders."""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data_scoring.base.files import explain
from data_scoring.base.progress import Reported, read_progress
from flows.run.folder import Run, read_run
from flows.run.locks import is_locked
from flows.stages.stage_order import Step, is_complete, steps_of
from trainer.checkpoint_folder import list_checkpoints, read_checkpoint_record
from trainer.rank_errors import root_cause

# The state of a run of which a file is damaged, or may not be read.
UNREADABLE = "unreadable"
# Older progress is that of a process that has ended, or hangs.
_FRESH_SECONDS = 60


@dataclass(frozen=True)
class SavedStep:
    """The last checkpoint of a round's training: its step, and how many the round has."""

    step: int
    num_steps: int


@dataclass(frozen=True)
class StageStatus:
    """The status of a stage.

    round: None for a stage that belongs to no round. state: done, running, failed, stopped or waiting. seconds: what a
    stage took that is done. progress: how far a running stage is. waits_for: what a waiting stage waits for, besides
    other stages. error, logs: why a stage failed, and the folder of its output. checkpoint: where a training that was
    stopped goes on. What does not apply, or is unknown, is None.
    """

    stage: str
    round: int | None
    state: str
    seconds: float | None = None
    progress: Reported | None = None
    waits_for: str | None = None
    error: str | None = None
    logs: Path | None = None
    checkpoint: SavedStep | None = None

    @property
    def name(self) -> str:
        """Return the name of the stage and round, such as `train 2`."""
        return self.stage if self.round is None else f"{self.stage} {self.round}"

    @property
    def detail(self) -> str:
        """Return how far the stage is, or why it is not done, as text; empty if there is nothing to say."""
        if self.seconds is not None:
            return f"{self.seconds:,.0f} s"
        if self.waits_for is not None:
            return f"for {self.waits_for}"
        if self.error is not None:
            return f"{self.error} (log: {self.logs})"
        if self.checkpoint is not None:
            return f"last checkpoint at step {self.checkpoint.step:,} of {self.checkpoint.num_steps:,}"
        if self.progress is None:
            return ""
        total = "" if self.progress.total is None else f" of {self.progress.total:,}"
        return f"{self.progress.what}: {self.progress.done:,}{total}"


@dataclass(frozen=True)
class RunStatus:
    """The status of a run.

    state: done, or that of the first stage that is not done, or unreadable, with the `error` that says why.
    """

    name: str
    folder: Path
    state: str
    num_stages_done: int
    num_stages: int
    stages: tuple[StageStatus, ...]
    error: str | None = None

    @property
    def current(self) -> StageStatus | None:
        """Return the first stage that is not done, or None if all are."""
        return next((row for row in self.stages if row.state != "done"), None)


def read_run_status(folder: Path) -> RunStatus:
    """Return the status of the run in `folder`. Raises ValueError if it holds none, or its files are damaged."""
    rows = tuple(read_status(folder))
    num_done = sum(row.state == "done" for row in rows)
    state = next((row.state for row in rows if row.state != "done"), "done")
    return RunStatus(folder.absolute().name, folder.absolute(), state, num_done, len(rows), rows)


def read_run_statuses(folder: Path) -> list[RunStatus]:
    """Return the status of every run in a folder of run folders, by name; one that cannot be read hides no other.

    Raises ValueError if there is none.
    """
    # Folders that begin with a dot are unfinished forks.
    folders = sorted(path.parent for path in folder.glob("[!.]*/run.yaml"))
    if not folders:
        raise ValueError(f"{folder}: holds no run; start one with `reprise run CONFIG.yaml`")
    return [_status_or_error(each) for each in folders]


def _status_or_error(folder: Path) -> RunStatus:
    try:
        return read_run_status(folder)
    except ValueError as error:
        reason = str(error)
    except OSError as error:
        explanation = explain(error)
        if explanation is None:
            raise
        reason = explanation
    return RunStatus(folder.absolute().name, folder.absolute(), UNREADABLE, 0, 0, (), reason)


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
            place = StageStatus(row.stage, row.round, row.state, checkpoint=_saved(run, step))
            return ", ".join(filter(None, [place.name, place.detail]))
    return None


def is_done(folder: Path) -> bool:
    """Return whether all stages of the run in `folder` are done."""
    return all(row.state == "done" for row in read_status(folder))


def _step_status(run: Run, step: Step, not_done: list[Step]) -> StageStatus:
    """Return the status of a step; `not_done` are the earlier steps that are not done."""
    status = partial(StageStatus, step.stage.name, step.round_number or None)
    # Earlier steps that no later step needs may still be open.
    is_possible = not any(each.stage.is_needed(run.config) for each in not_done)
    if is_possible and is_complete(run, step.stage.name, step.round_number):
        return status("done", seconds=_seconds(run, step))
    if not_done:
        return status("waiting")
    if is_locked(run.folder):
        return status("running", progress=_progress(run))
    waits_for = step.stage.waits_for(run, step.round_number)
    if waits_for is not None:
        return status("waiting", waits_for=waits_for)
    error = root_cause(run.folder / "logs" / "errors")
    if error is not None:
        return status("failed", error=error.message, logs=run.folder / "logs", checkpoint=_saved(run, step))
    return status("stopped", checkpoint=_saved(run, step))


def _seconds(run: Run, step: Step) -> float | None:
    record = run.completion(step.stage.name, step.round_number) if step.round_number else None
    return record["seconds"] if record else None


def _progress(run: Run) -> Reported | None:
    path = run.folder / "logs" / "progress.json"
    progress = read_progress(path)
    return None if progress is None or time.time() - path.stat().st_mtime > _FRESH_SECONDS else progress


def _saved(run: Run, step: Step) -> SavedStep | None:
    if step.stage.name != "train":
        return None
    checkpoints = list_checkpoints(run.round_folder(step.round_number) / "checkpoint")
    if not checkpoints:
        return None
    record = read_checkpoint_record(checkpoints[-1], "step", "num_steps")
    return SavedStep(record["step"], record["num_steps"])
