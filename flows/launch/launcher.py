"""Launching a job: its ranks are started, monitored until they end, and stopped when the launching process ends.

`Launcher` is the interface of a kind of launcher. To add one, write a subclass in a new file and add a row to
`flows.run.launcher_kinds.LAUNCHER_KINDS`.
"""

import pkgutil
import shutil
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

from data_scoring.base.progress import Progress, read_progress
from flows.launch.failures import raise_failure
from flows.run.config import LaunchConfig, RunConfig
from flows.run.errors import RanksFailedError
from flows.run.launcher_kinds import LAUNCHER_KINDS
from trainer.job import Job, write_job
from trainer.job_queue import JobQueue
from trainer.rank_errors import release_space

_SECONDS_BETWEEN_POLLS = 0.1
_SECONDS_BETWEEN_BEATS = 1.0
# Kept ranks that do not end by themselves within this time are stopped.
_SECONDS_TO_END = 30.0
_LONGEST_PAUSE = 60.0
_HERE = LaunchConfig(max_restarts=0)


class Launcher(ABC):
    """One attempt at a job: starts its ranks, polls them until they end, and stops them.

    Each rank runs `python -m trainer.worker JOB` on `job_path`, with torchrun's environment variables: RANK,
    LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT. `trainer.agent` is torchrun; it starts a host's ranks, and writes
    an error for a rank that is killed. The ranks' output goes to `log_path`.

    tools: the commands that the launcher needs on this host.
    keeps: whether the ranks wait for other jobs after theirs, until `queue` tells them to end.
    """

    tools: ClassVar[tuple[str, ...]] = ()
    keeps = False

    def __init__(self, job: Job, name: str, run_folder: Path, config: LaunchConfig) -> None:
        """Store the arguments; starts nothing. `name` is the stem of the job's files in the run folder."""
        self.job, self.name, self.run_folder, self.config = job, name, run_folder, config
        self.job_path = run_folder / "logs" / f"{name}.job.json"
        self.log_path = run_folder / "logs" / f"{name}.log"
        self.queue = JobQueue(self.job_path)

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
        """Write the job to `job_path`, where the ranks read it; call this when no ranks of an earlier launch run."""
        self.queue.clear()
        if self.keeps:
            self.queue.put(self.job_path)
        write_job(self.job, self.job_path)

    def hand_over(self, job: Job, name: str) -> None:
        """Have the ranks, which wait, do `job`; `name` is the stem of its file. Output goes to the same log."""
        self.job, self.name = job, name
        self.job_path = self.run_folder / "logs" / f"{name}.job.json"
        write_job(job, self.job_path)
        self.queue.put(self.job_path)

    def is_done(self) -> bool:
        """Return whether the ranks have done the job, and wait for another."""
        return self.keeps and self.queue.is_done(self.job_path)

    @abstractmethod
    def plan(self, command: Sequence[str]) -> str:
        """Return what would be run, for display: commands, a script, or what submits `command`, that of the run."""

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


def plan(job: Job, run_folder: Path, name: str, config: LaunchConfig, command: Sequence[str]) -> str:
    """Return what would be run to launch `job`; `command` is that of its run."""
    return launcher_class(config.kind)(job, name, run_folder, config).plan(command)


class KeptRanks:
    """The ranks of the last launch, which wait for another job with the same model; a context manager that ends them.

    They hold their devices: call `close` as soon as no such job follows.
    """

    def __init__(self) -> None:
        self._launcher: Launcher | None = None
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None
        self._ending: _Ending | None = None

    def __enter__(self) -> "KeptRanks":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
            self._wait()
            return
        try:
            if self._ending is not None:
                self._ending.hurry()
            self._wait()
        finally:
            if (launcher := self._release()) is not None:
                _end(launcher)

    def keep(self, launcher: Launcher) -> None:
        """Keep the ranks of `launcher`, which have done their job and wait."""
        self._launcher = launcher
        if launcher.config.nodes > 1 and launcher.config.launcher_kind.is_joined:
            self._is_over.clear()
            self._thread = threading.Thread(target=self._poll, args=(launcher,), daemon=True)
            self._thread.start()

    def take(self, job: Job) -> Launcher | None:
        """Return the launcher whose ranks wait and can do `job`; otherwise end them, wait until they have, return None.

        Raises what ending them has raised.
        """
        launcher = self._launcher
        if launcher is not None and job.can_follow(launcher.job) and _is_running(launcher):
            return self._release()
        self.close()
        self._wait()
        return None

    def close(self) -> None:
        """Have the ranks end, and return at once: the next launch, and the end of the context, wait for their end."""
        launcher = self._release()
        if launcher is not None:
            self._wait()
            self._ending = _Ending(launcher)

    def _wait(self) -> None:
        ending, self._ending = self._ending, None
        if ending is not None:
            ending.wait()

    def _release(self) -> Launcher | None:
        launcher, self._launcher = self._launcher, None
        self._is_over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return launcher

    def _poll(self, launcher: Launcher) -> None:
        """Poll while the ranks wait: joined hosts stop theirs when the launcher shows no sign of life."""
        while _is_running(launcher) and not self._is_over.wait(_SECONDS_BETWEEN_BEATS):
            pass


class _Ending:
    """Ranks that were told to end, in a thread that waits for it, and stops them if they take too long."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._is_hurried = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def hurry(self) -> None:
        """Stop the ranks now."""
        self._is_hurried.set()

    def wait(self) -> None:
        """Return when the ranks have ended; after a signal, stop them. Raises what ending them has raised."""
        try:
            self._thread.join()
        except BaseException:
            self.hurry()
            self._thread.join()
            raise
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._end()
        except Exception as error:  # noqa: BLE001 - raised by `wait`
            self._error = error

    def _end(self) -> None:
        try:
            self._launcher.queue.end()
            deadline = time.monotonic() + _SECONDS_TO_END
            while _is_running(self._launcher) and time.monotonic() < deadline:
                if self._is_hurried.wait(_SECONDS_BETWEEN_POLLS):
                    break
        finally:
            _end(self._launcher)


def _is_running(launcher: Launcher) -> bool:
    try:
        return launcher.poll() is None
    except RanksFailedError:
        return False


def _end(launcher: Launcher) -> None:
    """Stop a launcher's ranks, if they run, and delete the files that they left."""
    try:
        launcher.stop()
    finally:
        release_space(launcher.job.errors)
    launcher.queue.clear()


def launch(
    job: Job,
    run_folder: Path,
    name: str,
    progress: Progress,
    config: LaunchConfig = _HERE,
    kept: KeptRanks | None = None,
) -> None:
    """Run `job` on all its ranks according to `config`, until they are done; `name` is the stem of its log.

    With `kept`, the ranks that it keeps do the job, if they can, and the ranks that have done the job are kept.

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
        waiting = kept.take(job) if kept is not None else None
        launcher = waiting or launcher_class(config.kind)(job, name, run_folder, config)
        launcher.keeps = kept is not None
        start = launcher.start if waiting is None else partial(launcher.hand_over, job, name)
        try:
            if _attempt(launcher, job, start, progress, kept):
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


def _attempt(
    launcher: Launcher, job: Job, start: Callable[[], None], progress: Progress, kept: KeptRanks | None
) -> bool:
    """Return whether the ranks have done the job: ranks that were kept may have ended before they received it."""
    job.errors.mkdir(parents=True, exist_ok=True)
    for stale in [*job.errors.glob("rank-*.json"), job.progress]:
        stale.unlink(missing_ok=True)
    release_space(job.errors)
    is_kept = False
    try:
        start()
        while (code := launcher.poll()) is None and not launcher.is_done():
            _follow(launcher, progress)
            time.sleep(_SECONDS_BETWEEN_POLLS)
        _follow(launcher, progress)
        is_done = launcher.is_done() if launcher.keeps else code == 0
        if code is None and kept is not None:
            kept.keep(launcher)
            is_kept = True
    finally:
        if not is_kept:
            _end(launcher)
    if code and not is_done:
        raise_failure(job.errors, f"{launcher.describe()}; exit code {code}", launcher.log_path)
    return is_done


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
