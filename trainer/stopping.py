"""Stopping: what ends a rank, at once or after it has saved."""

import fcntl
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from trainer.job import Job

# Ranks that fail for the same reason have that long to leave their errors.
_SECONDS_TO_REPORT = 5.0
_SECONDS_OF_ECHO = 3.0


class StoppedError(Exception):
    """Training was asked to stop; what it had is saved."""


class StopRequest:
    """Whether this rank was asked to stop while it could heed that; at any other time SIGTERM ends it at once."""

    def __init__(self) -> None:
        self.is_made = False
        self._made_at = 0.0

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Note the first SIGTERM that comes while the body runs, instead of ending at once.

        Slurm tells every process to stop, and torchrun passes it on: what comes again at once is the same wish.
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

    Torchrun puts each rank in a session of its own, which no signal to the launcher's group reaches. Without a
    launcher, ranks that train save a checkpoint first, or finish the one that `stop` made them save: whoever told the
    launcher to stop may have less patience than a large checkpoint takes. A rank that waits for a failed one, inside a
    collective, does not act on signals. The processes that write a checkpoint end with their rank.
    """
    lock = os.open(job.lock, os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_SH)
    # Ctrl-C reaches torchrun, which passes it on, and the launcher, whose SIGTERM is what counts.
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
    # In the child it may have ended already.
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
    """Return whether a rank left its error, long enough ago."""
    with suppress(FileNotFoundError):  # The next launch removes them.
        return any(time.time() - path.stat().st_mtime > _SECONDS_TO_REPORT for path in job.errors.glob("rank-*.json"))
    return False
