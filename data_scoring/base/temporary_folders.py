"""Temporary folders that do not outlive their process for long: the next one deletes those of killed processes."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "reprise-"
# Held as long as the folder is in use. It has this name only once it is held.
_LOCK = ".reprise-in-use"


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a new folder among the system's temporary files, deleted at the end; those of killed processes are, too."""
    _delete_abandoned()
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as name:
        folder = Path(name)
        with (folder / f"{_LOCK}.new").open("w") as lock:
            # A file system without locks cannot tell whether the folder is in use: no other process deletes it.
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                (folder / f"{_LOCK}.new").rename(folder / _LOCK)
            yield folder


def _delete_abandoned() -> None:
    """Delete folders whose lock nobody holds: their processes were killed. Those without a lock are left alone."""
    for lock in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_LOCK}"):
        folder = lock.parent
        try:
            # A link may lead anywhere, and folders of other users are theirs.
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            with lock.open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except (BlockingIOError, FileNotFoundError):
            # It is in use, or another process has just deleted it.
            continue
