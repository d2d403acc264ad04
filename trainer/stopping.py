"""Stopping ranks, immediately or after saving a checkpoint."""

import fcntl
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from trainer.job import Job

# Time for other ranks that fail for the same reason to write their errors.
_SECONDS_TO_REPORT = 5.0
_SECONDS_OF_ECHO = 3.0


class StoppedError(Exception):
    """Training was asked to stop, and its state is saved."""


class StopRequest:
    """Whether this rank received a stop request while `heeded`; at other times SIGTERM ends it immediately."""

    def __init__(self) -> None:
        self.is_made = False
        self._made_at = 0.0

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Record the first SIGTERM during the context instead of ending.

        Slurm signals every process, and torchrun forwards the signal: a second SIGTERM shortly after the first is
        ignored as a duplicate; a later one ends the process.
        """
        before = signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.is_made:
            self._made_at = now
        elif now - self._made_at > _SECONDS_OF_ECHO:
            os._exit(128 + number)
        self.is_made = True


def end_with_launcher(job: Job, stop: StopRequest) -> None:
    """Hold the ranks' lock while this process lives, and end it when torchrun or the launcher ends, or a rank fails.

    torchrun starts each rank in its own session, which signals to the launcher's group do not reach. When the launcher
    has ended, training ranks first save a checkpoint, or finish the one that `stop` started: the launcher may be killed
    before a large checkpoint is complete. A rank that waits for a failed one in a collective does not handle signals,
    so it exits directly. Processes that write a checkpoint end with their rank.
    """
    lock = os.open(job.lock, os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_SH)
    # torchrun forwards Ctrl-C; ignore it, because the launcher, which receives it too, sends SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    launcher = os.environ.get("REPRISE_LAUNCHER")
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent and (launcher is None or _is_alive(int(launcher))):
            if _has_failed(job):
                os._exit(1)
            time.sleep(0.5)
        if not stop.is_made:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(job.seconds_to_stop)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    os.register_at_fork(before=_note_parent, after_in_child=_end_with_parent)


_parents: list[int] = [0]


def _note_parent() -> None:
    # Noted before the fork, since the parent may have ended by the time the child runs.
    _parents[0] = os.getpid()


def _end_with_parent() -> None:
    parent = _parents[0]

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def _has_failed(job: Job) -> bool:
    """Return whether a rank wrote its error at least `_SECONDS_TO_REPORT` ago."""
    with suppress(FileNotFoundError):  # The next launch removes them.
        return any(time.time() - path.stat().st_mtime > _SECONDS_TO_REPORT for path in job.errors.glob("rank-*.json"))
    return False
