"""Files of DuckDB that hold nothing but views, and are replaced as a whole while other programs read them."""

import itertools
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from data_scoring.base.files import exclusive, remove_leftovers, writing
from data_scoring.base.sql import check_path, writing_errors

if TYPE_CHECKING:
    import duckdb

_LOG = logging.getLogger(__name__)
# Only tables make a database of views larger.
_LARGEST_BYTES = 16 << 20


@contextmanager
def replacing_views(path: Path) -> Iterator["duckdb.DuckDBPyConnection"]:
    """Yield a connection to a new database for commented views; on success, it replaces the file `path`.

    DuckDB from 1.0 on can read the file. It is renamed into place, so readers that have the old file open are not
    disturbed. A file that another program has written to is kept under another name, and a warning says so.
    """
    check_path(path)
    with _locked(path) as lock:
        with writing(path) as temporary:
            with writing_errors(path), _new_database(temporary) as connection:
                yield connection
            # Looking into a database takes time, which is saved for one that is as it was written here.
            if lock.read_text() != _state_of(path) or _log_of(path).exists():
                _keep_foreign(path)
        lock.write_text(_state_of(path))


@contextmanager
def _locked(path: Path) -> Iterator[Path]:
    """Lock the file `path` against others that replace it; delete what a killed process left of a replacement.

    Yields the lock's file, which holds the state of the file that was last written under it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.stem}.lock")
    with exclusive(lock):
        remove_leftovers(path.parent, path.name)
        yield lock


def remove_leftover_views(path: Path) -> None:
    """Delete what a killed process left of a replacement of the file `path`."""
    with _locked(path):
        pass


@contextmanager
def _new_database(path: Path) -> Iterator["duckdb.DuckDBPyConnection"]:
    import duckdb

    # What follows a ? counts as options, before which DuckDB puts the ending of the write-ahead log's name.
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "new.duckdb" if "?" in str(path) else path
        with duckdb.connect(str(place), config={"storage_compatibility_version": "v1.0.0"}) as connection:
            # In one transaction, as the log of each would go to the disk by itself.
            connection.begin()
            yield connection
            connection.commit()
            # Closing the connection writes the file, too, but ignores errors such as a full disk.
            connection.execute("checkpoint")
        if place != path:
            shutil.copyfile(place, path)


def _keep_foreign(path: Path) -> None:
    """Keep a database that another program has written to under another name, together with its write-ahead log."""
    log = _log_of(path)
    if not log.exists() and (not path.exists() or _has_only_views(path)):
        return
    names = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(1))
    kept = next(name for name in names if not name.exists() and not _log_of(name).exists())
    if path.exists():
        try:
            # A second name, so that there is a database at any moment.
            kept.hardlink_to(path)
        except OSError:
            path.rename(kept)
    if log.exists():
        # Beside a newer database, the log would keep that from being opened.
        log.rename(_log_of(kept))
    _LOG.warning(
        "%s: another program has written to it, or was killed while it did so; its file is kept as %s, and the views "
        "are written again; write tables to a database of your own, and attach this one there",
        path,
        kept.name,
    )


def _state_of(path: Path) -> str:
    """Return a file's inode, size and time of modification, or an empty string if there is no such file."""
    if not path.exists():
        return ""
    state = path.stat()
    return f"{state.st_ino} {state.st_size} {state.st_mtime_ns}"


def _log_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.wal")


def _has_only_views(path: Path) -> bool:
    """Return whether a database holds commented views alone, and nothing that somebody else has written."""
    import duckdb

    if path.stat().st_size > _LARGEST_BYTES:
        return False
    # Another program may hold a lock on the file, or be kept from opening it by one.
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy.duckdb"
        shutil.copyfile(path, copy)
        try:
            with duckdb.connect(str(copy), read_only=True) as connection:
                found = connection.sql(
                    """select 1 from duckdb_tables() where not internal
                    union all select 1 from duckdb_views() where not internal and comment is null
                    union all select 1 from duckdb_functions() where not internal"""
                ).fetchall()
        except duckdb.Error:
            return False
    return not found
