"""Checksums of files: recorded after the files are written, verified before the files are used."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_scoring.base.engine import Count, Engine
from data_scoring.base.files import checksum, read_json, write_record
from data_scoring.base.progress import Progress, silent

# Hashing releases the GIL; more threads than this only compete for the disk.
_MOST_THREADS = 8
# One host reads as much in a minute.
_MANY_BYTES = 100 << 30
# A file may change again within one tick of the file system's clock, and then show the same time.
_TICK_NS = 50_000_000


@dataclass(frozen=True)
class WrittenFile:
    """A file as it was written: its BLAKE2b checksum, 32 hex digits, and its size (None: not recorded)."""

    checksum: str
    num_bytes: int | None = None


class FileVerifier:
    """Compares files with their recorded checksums, reading each version of a file once.

    `memory` is a JSON file with the inodes, sizes and modification times of verified files, and their checksums. A file
    that still has these is not read again, unless `reads_all`. Hard links to a file count as the same file.
    """

    def __init__(self, memory: Path, reads_all: bool = False) -> None:
        self._memory = memory
        self._known = {} if reads_all else _read_memory(memory)
        self._is_changed = False

    def measure(self, paths: Iterable[Path]) -> dict[Path, WrittenFile]:
        """Return the files `paths` as they are now, which count as verified."""
        measured = {}
        for path, (value, num_bytes) in self._read_all(list(paths), silent):
            measured[path] = WrittenFile(value, num_bytes)
        self._remember()
        return measured

    def find_damage(
        self,
        files: Mapping[Path, WrittenFile],
        progress: Progress = silent,
        open_engine: Callable[[], Engine] | None = None,
    ) -> dict[Path, str]:
        """Return what is wrong with each of `files` that is not as it was written; empty if all are.

        open_engine: returns an engine of other hosts, which reads the files if there are many bytes to read; None: this
        process reads them.
        """
        damage: dict[Path, str] = {}
        unread = []
        for path, written in files.items():
            try:
                state = path.stat()
            except (FileNotFoundError, NotADirectoryError):
                damage[path] = "it is missing"
                continue
            if written.num_bytes is not None and state.st_size != written.num_bytes:
                damage[path] = f"it has {state.st_size:,} bytes instead of {written.num_bytes:,}"
            elif self._known.get(_inode(state)) != [written.checksum, *_version(state)]:
                unread.append(path)
        for path, (value, _) in self._read_all(unread, progress, open_engine):
            if value != files[path].checksum:
                damage[path] = "its checksum differs"
        self._remember()
        return damage

    def _read_all(
        self, paths: list[Path], progress: Progress, open_engine: Callable[[], Engine] | None = None
    ) -> Iterator[tuple[Path, tuple[str, int]]]:
        """Yield the checksum and the size of each file, and remember them for this version of it."""
        states = [(path.stat(), time.time_ns()) for path in paths]
        with ExitStack() as stack:
            if open_engine is not None and sum(state.st_size for state, _ in states) > _MANY_BYTES:
                engine = stack.enter_context(open_engine())
                values = engine.map(_checksum_of, paths, lambda done: None)
            else:
                pool = stack.enter_context(ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)))
                values = pool.map(checksum, paths)
            for done, (path, value, (before, started)) in enumerate(zip(paths, values, states, strict=True), start=1):
                after = path.stat()
                if started - before.st_mtime_ns > _TICK_NS and _version(before) == _version(after):
                    self._known[_inode(after)] = [value, *_version(after)]
                    self._is_changed = True
                progress("verifying checksums (files)", done, len(paths))
                yield path, (value, after.st_size)

    def _remember(self) -> None:
        if self._is_changed:
            # A run folder that cannot be written to can be read all the same.
            with suppress(OSError):
                write_record(self._memory, self._known)
            self._is_changed = False


def _checksum_of(path: Path, count: Count) -> str:
    return checksum(path)


def _inode(state: os.stat_result) -> str:
    return f"{state.st_dev}:{state.st_ino}"


def _version(state: os.stat_result) -> list[int]:
    return [state.st_size, state.st_mtime_ns]


def _read_memory(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
