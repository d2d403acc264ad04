"""What is done, what is running and what has failed, told from run folders alone."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_scoring.base.files import read_json
from flows.run.folder import Run, read_run
from flows.run.locks import is_locked
from flows.run.rank_errors import first_error
from trainer.checkpoint_folder import list_checkpoints, read_checkpoint_record


@dataclass(frozen=True)
class StageStatus:
    """How a stage stands: `state` is done, running, failed, stopped or waiting; `detail` says how far or why."""

    name: str
    state: str
    detail: str


def read_status(folder: Path) -> list[StageStatus]:
    """Return the stages of the run in `folder`, in order, up to its last round."""
    run = read_run(folder)
    stages: list[tuple[str, int]] = [("prepare", 0)]
    if run.config.model.inherits:
        stages.append(("inherit", 1))
    for number in range(1, run.config.rounds.num_rounds + 1):
        if number > 1:
            stages += [("score", number - 1), ("refine", number)]
        stages += [("mix", number), ("train", number)]
        if run.config.eval.asked:
            stages.append(("evaluate", number))
    rows: list[StageStatus] = []
    for stage, number in stages:
        rows.append(_stage_status(run, stage, number, rows))
    return rows


def _stage_status(run: Run, stage: str, number: int, before: list[StageStatus]) -> StageStatus:
    name = f"{stage} {number}" if number else stage
    open_stages = [row.name for row in before if row.state != "done"]
    # Nothing that comes after it needs an evaluation, which may be asked for, or be asked anew, when all is done.
    is_possible = all(each.startswith("evaluate ") for each in open_stages)
    if is_possible and run.is_complete(stage, number):
        return StageStatus(name, "done", _duration(run, stage, number))
    if open_stages:
        return StageStatus(name, "waiting", "")
    if is_locked(run.folder):
        return StageStatus(name, "running", _progress(run))
    if stage == "mix" and run.awaits_approval(number):
        return StageStatus(name, "waiting", f"for approval: reprise approve {run.folder}")
    error = first_error(run.folder / "logs" / "errors")
    if error is not None:
        return StageStatus(name, "failed", f"{error['message']} (log: {run.folder / 'logs'})")
    return StageStatus(name, "stopped", _saved(run, stage, number))


def _duration(run: Run, stage: str, number: int) -> str:
    record: dict[str, Any] | None = read_json(run.round_folder(number) / f"{stage}.json") if number else None
    return f"{record['seconds']:,.0f} s" if record else ""


def _progress(run: Run) -> str:
    path = run.folder / "logs" / "progress.json"
    progress = read_json(path)
    if progress is None or time.time() - path.stat().st_mtime > 60:
        return ""
    return f"{progress['what']}: {progress['done']:,} of {progress['total']:,}"


def _saved(run: Run, stage: str, number: int) -> str:
    checkpoints = list_checkpoints(run.round_folder(number) / "checkpoint") if stage == "train" else []
    if not checkpoints:
        return ""
    record = read_checkpoint_record(checkpoints[-1])
    return f"the last checkpoint is of step {record['step']:,} of {record['num_steps']:,}"
