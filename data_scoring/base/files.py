"""Files that are never half-written: temporary name, fsync, rename, then the completion record."""

import errno
import fcntl
import hashlib
import json
import os
import resource
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from data_scoring.base.messages import one_line

# The key of a record's own checksum.
_SEAL = "record_checksum"


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is fsynced and renamed to `path`, on failure removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes of other hosts and containers may have the same id, and write the same file at the same time.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        commit(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise


@contextmanager
def making(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder; on success it is renamed to `folder`, on failure removed with the parents it created.

    OSErrors name `folder`, not the temporary one. Raises ValueError if `folder` exists, or another process makes it.
    """
    temporary, lock = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("tmp", "lock"))
    absent = [parent for parent in folder.parents if not parent.exists()]
    try:
        for parent in reversed(absent):
            parent.mkdir(exist_ok=True)
        with _sole_maker(folder, lock):
            if folder.exists():
                raise ValueError(f"{folder}: already exists; name another folder")
            # A killed process may have left one behind.
            shutil.rmtree(temporary, ignore_errors=True)
            try:
                temporary.mkdir()
                yield temporary
                commit(temporary, folder)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
    except BaseException as error:
        with suppress(OSError):
            for parent in absent:
                parent.rmdir()
        if isinstance(error, OSError) and error.errno:
            name = str(error.filename or folder)
            error.filename = name.replace(str(temporary), str(folder)).replace(str(lock), str(folder))
        raise


@contextmanager
def _sole_maker(folder: Path, lock: Path) -> Iterator[None]:
    """Hold the lock file `lock`, and delete it at the end. Raises ValueError if another process holds it."""
    descriptor = _locked_file(folder, lock)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _locked_file(folder: Path, lock: Path) -> int:
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ValueError(f"{folder}: being made by another process; wait for it, or name another folder") from None
        except OSError:
            # This file system has no locks.
            return descriptor
        # The process that held it before may have deleted it meanwhile.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), lock.stat()):
                return descriptor
        os.close(descriptor)


def commit(temporary: Path, path: Path) -> None:
    """Fsync the finished file or folder `temporary` and rename it to `path`."""
    for file in [temporary, *temporary.rglob("*")] if temporary.is_dir() else [temporary]:
        _fsync(file)
    temporary.rename(path)
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as JSON, atomically."""
    with writing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write `record` to `path` as JSON, atomically, with a checksum that `read_json` verifies."""
    write_json(path, {**record, _SEAL: fingerprint(record)})


def read_json(path: Path, remedy: str = "delete it and run the same command again") -> Any:
    """Return the JSON value in `path`, without its checksum, or None if the file does not exist.

    Raises ValueError, naming the file and the remedy, if it is not JSON, or was changed after `write_record` wrote it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        seal = content.pop(_SEAL, None) if isinstance(content, dict) else None
        is_changed = seal is not None and seal != fingerprint(content)
    except FileNotFoundError:
        return None
    except IsADirectoryError:
        raise ValueError(f"{path}: is a folder, not a file; {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({one_line(error)}); {remedy}") from None
    if content is None:
        raise ValueError(f"{path}: null is no record; {remedy}")
    if is_changed:
        restore = "" if remedy.startswith("restore") else "restore it from a copy, or "
        raise ValueError(f"{path}: damaged: its checksum differs from its content; {restore}{remedy}")
    return content


def fingerprint(*parts: Any) -> str:
    """Return 16 hex digits that identify JSON-serialisable `parts`."""
    canonical = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(canonical.encode(), digest_size=8).hexdigest()


def checksum(path: Path) -> str:
    """Return the BLAKE2b checksum of a file's content, 32 hex digits, in constant memory."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def disk_error(reason: str, path: Path) -> OSError | None:
    """Return the OSError, naming `path`, that a library's error message `reason` describes, or None."""
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EACCES):
        if os.strerror(number) in reason:
            return OSError(number, os.strerror(number), str(path))
    return None


def explain(error: OSError) -> str | None:
    """Return one line with the remedy for an error that the user can fix (no space, no access), else None."""
    remedies = {
        errno.ENOSPC: "free some space and run the same command again: completed work is kept",
        errno.EDQUOT: "raise your quota or free some space, and run the same command again: completed work is kept",
        errno.EACCES: "give yourself access to it, or name another folder",
        errno.EROFS: "name a writable folder",
        errno.ENOTDIR: "part of this path is a file; name another folder",
    }
    # Arrow's errors carry the number only in their text.
    numbers = [error.errno] if error.errno else [number for number in remedies if f"[errno {number}]" in str(error)]
    if not numbers or numbers[0] not in remedies:
        return None
    return f"{error.filename or 'the disk'}: {os.strerror(numbers[0])}; {remedies[numbers[0]]}"


def allow_open_files(count: int) -> None:
    """Raise this process's limit to hold `count` files open. Raises ValueError if the system's limit is lower."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + 256
    if soft >= needed or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ValueError(
            f"corpus.num_shards: {needed} open files are needed, but {hard} are allowed; lower corpus.num_shards, "
            "or raise the limit (ulimit -Hn)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Wait until no other process holds the lock file `path`, and hold it; the lock ends with the process."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path, name: str = "", besides: Iterable[str] = ()) -> None:
    """Delete the temporary files of a killed process in `folder`: of names that start with `name`, `besides` some."""
    kept = tuple(f".{each}." for each in besides)
    for pattern in (f".{name}*.tmp", f".{name}*.tmp.wal"):
        for leftover in folder.glob(pattern):
            if not leftover.is_dir() and not leftover.name.startswith(kept):
                # A task that is done twice may just have renamed it.
                leftover.unlink(missing_ok=True)
