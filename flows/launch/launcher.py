"""Launching a job: its ranks are started, monitored until they end, and stopped when the launching process ends.

`Launcher` is the interface of a kind of launcher. To add one, write a subclass in a new file and add a row to
`flows.run.launcher_kinds.LAUNCHER_KINDS`.
"""

import pkgutil
import shutil
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from data_scoring.base.progress import Progress, read_progress
from flows.launch.failures import raise_failure
from flows.run.config import LaunchConfig, RunConfig
from flows.run.errors import RanksFailedError
from flows.run.launcher_kinds import LAUNCHER_KINDS
from trainer.job import Job, write_job
from trainer.rank_errors import release_space

_LONGEST_PAUSE = 60.0
_HERE = LaunchConfig(max_restarts=0)


class Launcher(ABC):
    """One attempt at a job: starts its ranks, polls them until they end, and stops them.

    Each rank runs `python -m trainer.worker JOB` on `job_path`, with torchrun's environment variables: RANK,
    LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT. `trainer.agent` is torchrun; it starts a host's ranks, and writes
    an error for a rank that is killed. The ranks' output goes to `log_path`.

    tools: the commands that the launcher needs on this host.
    """

    tools: ClassVar[tuple[str, ...]] = ()

    def __init__(self, job: Job, name: str, run_folder: Path, config: LaunchConfig) -> None:
        """Store the arguments; starts nothing. `name` is the stem of the job's files in the run folder."""
        self.job, self.name, self.run_folder, self.config = job, name, run_folder, config
        self.job_path = run_folder / "logs" / f"{name}.job.json"
        self.log_path = run_folder / "logs" / f"{name}.log"

    @classmethod
    def missing_tools(cls) -> list[str]:
        """Return the needed commands that this host lacks."""
        return [tool for tool in cls.tools if shutil.which(tool) is None]

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """Raise ValueError if the ranks of a run of `config` cannot be started from this host."""
        cls.check_tools(config.launch.kind)

    @classmethod
    def check_tools(cls, kind: str) -> None:
        """Raise ValueError if commands are missing; `kind` is the launcher's name in the configuration."""
        missing = cls.missing_tools()
        if missing:
            raise ValueError(
                f"launch.kind: {kind} needs {', '.join(missing)}; start this on a host that has them, "
                "or set kind: local"
            )

    def write_job(self) -> None:
        """Write the job to `job_path`, where the ranks read it."""
        write_job(self.job, self.job_path)

    @abstractmethod
    def plan(self) -> str:
        """Return what `start` would run, for display: commands, or a script."""

    @abstractmethod
    def start(self) -> None:
        """Write the job, start the ranks, and return immediately. Raises ValueError if they cannot be started."""

    @abstractmethod
    def poll(self) -> int | None:
        """Return None while ranks run, then 0 if all have succeeded, else another exit code.

        Called a few times per second. Raises RanksFailedError if they cannot finish, for example if a host is lost.
        """

    @abstractmethod
    def stop(self) -> None:
        """Stop the running ranks, which have `job.seconds_to_stop` to save; return when they have ended.

        Called after `start`, even if it failed, and also after the ranks have ended.
        """

    @abstractmethod
    def describe(self) -> str:
        """Return the status of the attempt; shown until the ranks report progress."""


def launcher_class(kind: str) -> type[Launcher]:
    """Return the class of a kind of launcher, imported. Raises TypeError if its row names anything else."""
    found = pkgutil.resolve_name(LAUNCHER_KINDS[kind].launcher)
    if not (isinstance(found, type) and issubclass(found, Launcher)):
        raise TypeError(f"{LAUNCHER_KINDS[kind].launcher} is not a Launcher")
    return found


def check(config: RunConfig) -> None:
    """Raise ValueError if the ranks of a run of `config` cannot be started from this host."""
    launcher_class(config.launch.kind).check(config)


def plan(job: Job, run_folder: Path, name: str, config: LaunchConfig) -> str:
    """Return what would be run to launch `job`."""
    return launcher_class(config.kind)(job, name, run_folder, config).plan()


def launch(job: Job, run_folder: Path, name: str, progress: Progress, config: LaunchConfig = _HERE) -> None:
    """Run `job` on all its ranks according to `config`, until they are done; `name` is the stem of its log.

    If ranks or hosts are lost, the job is restarted and resumes from what is saved, up to `config.max_restarts` times
    in a row without new saved work. Raises ValueError with a rank's own message if the user can fix the cause, else
    `RanksFailedError`; both name the log.
    """
    logs = run_folder / "logs"
    logs.mkdir(exist_ok=True)
    if config.launcher_kind.sees_devices:
        # The job's file tells which kernels were used; elsewhere, ranks resolve them.
        job = job.resolved()
    restarts = 0
    while True:
        saved = job.saved_work()
        try:
            _attempt(launcher_class(config.kind)(job, name, run_folder, config), progress)
            return
        except RanksFailedError as error:
            restarts = 0 if job.saved_work() != saved else restarts
            if restarts == config.max_restarts:
                raise
            restarts += 1
            with (logs / f"{name}.log").open("a", encoding="utf-8") as log:
                log.write(f"reprise: {error}\nreprise: restarting ({restarts} of {config.max_restarts})\n")
        _pause(2.0**restarts, progress)


def _pause(seconds: float, progress: Progress) -> None:
    until = time.monotonic() + min(seconds, _LONGEST_PAUSE)
    while time.monotonic() < until:
        progress("restarting", 0, None)
        time.sleep(0.2)


def _attempt(launcher: Launcher, progress: Progress) -> None:
    job = launcher.job
    job.errors.mkdir(parents=True, exist_ok=True)
    for stale in [*job.errors.glob("rank-*.json"), job.progress]:
        stale.unlink(missing_ok=True)
    release_space(job.errors)
    try:
        launcher.start()
        while (code := launcher.poll()) is None:
            _follow(launcher, progress)
            time.sleep(0.2)
        _follow(launcher, progress)
    finally:
        launcher.stop()
        release_space(job.errors)
    if code != 0:
        raise_failure(job.errors, f"{launcher.describe()}; exit code {code}", launcher.log_path)


def _follow(launcher: Launcher, progress: Progress) -> None:
    state = read_progress(launcher.job.progress)
    if state is None:
        progress(launcher.describe(), 0, None)
        return
    details = [
        f"{name.replace('_', ' ')} {value:,}" if isinstance(value, int) else f"{name.replace('_', ' ')} {value:,.4g}"
        for name, value in state.details.items()
    ]
    progress(" · ".join([state.what, *details]), state.done, state.total)
