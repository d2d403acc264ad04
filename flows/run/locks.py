"""Locks: exclusive access to a run folder, and waiting for ranks of an earlier launch."""

import fcntl
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_scoring.base.databases import remove_leftover_views
from data_scoring.base.files import exclusive, remove_leftovers


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the run in `folder` against other processes. The lock is released when the process ends, however it ends.

    Raises ValueError, naming the process, if another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode()
            raise ValueError(f"{folder}: in use by {holder}; wait for it to end, or stop it") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        evaluated = (place for place in folder.glob("rounds/*/evaluation/**/") if place.is_dir())
        rounds = (*folder.glob("rounds/*"), *folder.glob("rounds/*/seen"), *evaluated)
        # The ledger and the report have locks of their own, since they may be written while the run is locked.
        remove_leftovers(folder, besides=("ledger.duckdb", "report.html"))
        remove_leftover_views(folder / "ledger.duckdb")
        with report_locked(folder):
            pass
        for place in (*rounds, folder / "evaluation", folder / "corpus"):
            remove_leftovers(place)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def report_locked(folder: Path) -> Iterator[None]:
    """Lock the report in the run folder `folder`, which may be written while the run is locked; wait if necessary."""
    with exclusive(folder / ".report.lock"):
        remove_leftovers(folder, "report.html")
        remove_leftovers(folder / "report")
        yield


def is_locked(folder: Path) -> bool:
    """Return whether a running process holds the lock of the run in `folder`."""
    try:
        descriptor = os.open(folder / ".lock", os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def wait_for_ranks_to_end(path: Path, seconds: float) -> None:
    """Wait until no rank of an earlier launch holds the lock at `path`, which all ranks share.

    Ranks end after their launcher, once they have saved. Raises ValueError if one is still running after `seconds`.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"{path}: ranks of an earlier launch are still running; find them with "
                        "`pgrep -f trainer.worker` and stop them"
                    ) from None
                time.sleep(0.1)
    finally:
        os.close(descriptor)
