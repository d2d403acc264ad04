"""Launching: a job's ranks, here or under Slurm, followed until they end, and stopped with whoever launched them."""

import json
import os
import re
import shlex
import signal
import time
import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, Protocol

from data_scoring.base.progress import Progress
from flows.launch import torchrun
from flows.launch.hosts import Leader
from flows.launch.log_lines import redact
from flows.launch.slurm import SlurmRanks, script
from flows.launch.torchrun import Rendezvous
from flows.run.config import LaunchConfig
from flows.run.locks import ranks_gone
from flows.run.rank_errors import RanksFailedError, first_error
from trainer.checkpoint_folder import list_checkpoints
from trainer.jobs import EvaluateJob, Job

_LONGEST_PAUSE = 60.0
_HERE = LaunchConfig(max_restarts=0)


class _Ranks(Protocol):
    """Ranks that were started."""

    def poll(self) -> int | None:
        """Return their exit code, or None while they run."""

    def stop(self) -> None:
        """End them, if they still run."""

    def describe(self) -> str:
        """Return what they do before they say so themselves."""


class _LocalRanks:
    """Ranks under torchrun on this host, and on those that join it."""

    def __init__(self, job: Job, job_path: Path, run_folder: Path, log: BinaryIO, launch: LaunchConfig) -> None:
        rendezvous = local_rendezvous(job, launch)
        self._seconds_to_stop = job.seconds_to_stop
        self._leader = Leader(run_folder, job_path, rendezvous) if launch.nodes > 1 else None
        self._process = torchrun.start(job_path, rendezvous, is_head=True, interface=launch.interface, log=log)

    def poll(self) -> int | None:
        lost = self._leader.lost_host() if self._leader is not None else None
        if lost is not None:
            raise RanksFailedError(f"host {lost} has fallen silent; type `reprise join` there again")
        return self._process.poll()

    def stop(self) -> None:
        try:
            torchrun.stop(self._process, self._seconds_to_stop)
        finally:
            if self._leader is not None:
                self._leader.end()

    def describe(self) -> str:
        return "starting ranks" if self._leader is None else "starting ranks, and waiting for the other hosts to join"


def local_rendezvous(job: Job, launch: LaunchConfig) -> Rendezvous:
    """Return where the hosts of an attempt at `job` meet, started by torchrun."""
    return Rendezvous(
        id=uuid.uuid4().hex[:12],
        endpoint=launch.rendezvous if launch.nodes > 1 and launch.rendezvous else "127.0.0.1:0",
        num_nodes=launch.nodes,
        processes_per_node=job.parallel.world_size // launch.nodes,
        join_seconds=round(60 * launch.join_minutes),
        seconds_to_stop=job.seconds_to_stop,
    )


def plan(job: Job, run_folder: Path, name: str, config: LaunchConfig) -> str:
    """Return what would be run to launch `job`: torchrun's command on each host, or the script for Slurm."""
    logs = run_folder / "logs"
    job_path = logs / f"{name}.job.json"
    if config.kind == "slurm":
        return script(job, job_path, name, logs / f"{name}.log", config)
    here = shlex.join(torchrun.command(job_path, local_rendezvous(job, config), is_head=True, address="ADDRESS"))
    return here if config.nodes == 1 else f"{here}\n# and on {config.nodes - 1} more hosts:\nreprise join {run_folder}"


def launch(job: Job, run_folder: Path, name: str, progress: Progress, config: LaunchConfig = _HERE) -> None:
    """Run `job` on all its ranks as `config` says and return when they are done; `name` names its log.

    Where ranks or hosts are lost it is started again and goes on from what is saved, up to `config.max_restarts` times
    without getting any further.
    Raises ValueError with a rank's own message where the user can mend what is wrong, else `RanksFailedError`;
    both name the log.
    """
    logs = run_folder / "logs"
    logs.mkdir(exist_ok=True)
    job_path = logs / f"{name}.job.json"
    restarts = 0
    while True:
        reached = _reached(job)
        try:
            _attempt(job, job_path, run_folder, name, progress, config)
            return
        except RanksFailedError as error:
            restarts = 0 if _reached(job) != reached else restarts
            if restarts == config.max_restarts:
                raise
            restarts += 1
            with (logs / f"{name}.log").open("a", encoding="utf-8") as log:
                log.write(f"reprise: {error}\nreprise: starting again ({restarts} of {config.max_restarts})\n")
        _pause(2.0**restarts, progress)


def _reached(job: Job) -> tuple[str | int, ...]:
    """Return how far a job has come, in what a restart would find: the last checkpoint, scored shards and parts."""
    checkpoints = list_checkpoints(job.round_folder / "checkpoint")
    losses = job.round_folder / "losses"
    folders = [job.answers] if isinstance(job, EvaluateJob) else [losses, losses / "parts"]
    # Answers without a block of layers have a folder each.
    pattern = "**/*.parquet" if isinstance(job, EvaluateJob) else "*.parquet"
    counts = (len(list(folder.glob(pattern))) for folder in folders)
    return checkpoints[-1].name if checkpoints else "", *counts


def _pause(seconds: float, progress: Progress) -> None:
    until = time.monotonic() + min(seconds, _LONGEST_PAUSE)
    while time.monotonic() < until:
        progress("starting again", 0, None)
        time.sleep(0.2)


def _attempt(job: Job, job_path: Path, run_folder: Path, name: str, progress: Progress, config: LaunchConfig) -> None:
    log_path = job_path.with_name(f"{name}.log")
    job.errors.mkdir(parents=True, exist_ok=True)
    for stale in [*job.errors.glob("rank-*.json"), job.progress]:
        stale.unlink(missing_ok=True)
    with ExitStack() as stack:
        log = stack.enter_context(log_path.open("ab"))
        started = log.tell()
        ranks: _Ranks
        if config.kind == "slurm":
            ranks = SlurmRanks(job, job_path, name, log_path, config)
        else:
            job_path.write_text(job.model_dump_json(indent=2), encoding="utf-8")
            stack.enter_context(ranks_gone(job.lock, 60 + job.seconds_to_stop))
            ranks = _LocalRanks(job, job_path, run_folder, log, config)
        stack.callback(ranks.stop)
        while (code := ranks.poll()) is None:
            _follow(job, progress, ranks)
            time.sleep(0.2)
        _follow(job, progress, ranks)
    if code != 0:
        _raise_failure(job, f"{ranks.describe()}; exit code {code}", log_path, started)


def _follow(job: Job, progress: Progress, ranks: _Ranks) -> None:
    try:
        state = json.loads(job.progress.read_text(encoding="utf-8"))
    except FileNotFoundError:
        progress(ranks.describe(), 0, None)
        return
    what, done, total = (state.pop(name) for name in ("what", "done", "total"))
    details = [
        f"{name.replace('_', ' ')} {value:,}" if isinstance(value, int) else f"{name.replace('_', ' ')} {value:,.4g}"
        for name, value in state.items()
    ]
    progress(" · ".join([what, *details]), done, total)


def _raise_failure(job: Job, state: str, log_path: Path, started: int) -> None:
    where = f"(log: {log_path})"
    goes_on = "the same command goes on from the last checkpoint"
    first = first_error(job.errors)
    if first is not None and first["is_user_error"]:
        raise ValueError(redact(f"{first['message']} {where}", os.environ))
    killed = _killed_rank(log_path, started)
    if killed is not None:
        # The others' errors are but that they lost it.
        raise RanksFailedError(f"rank {killed[0]} was killed by {killed[1]} (out of memory?); {goes_on} {where}")
    if first is None:
        raise RanksFailedError(f"the ranks ended and left no error ({state}); {goes_on} {where}")
    message = f"rank {first['rank']}: {first['kind']}: {first['message']} {where}\n{_innermost(first['traceback'])}"
    raise RanksFailedError(redact(message, os.environ))


def _killed_rank(log_path: Path, started: int) -> tuple[int, str] | None:
    """Return the rank that a signal ended before any other failed, and the signal, as torchrun's summary has it."""
    with log_path.open("rb") as log:
        log.seek(started)
        text = log.read().decode("utf-8", "replace")
    cause = text.rpartition("Root Cause")[2]
    found = re.search(r"rank\s*:\s*(\d+).*?exitcode\s*:\s*-(\d+)", cause, re.DOTALL)
    if not found or found[0].count("exitcode") > 1:
        return None
    return int(found[1]), signal.Signals(int(found[2])).name


def _innermost(traceback: str) -> str:
    """Return the last calls of a traceback, a line each: where a rank failed, without what led there."""
    calls = re.findall(r'File "(.+)", line (\d+), in (.+)', traceback)
    return "\n".join(f"  {file}:{line} in {function}" for file, line, function in calls[-4:])
