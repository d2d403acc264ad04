"""Cutting sources into parts that are read independently: some files, or a stretch of one.

Where the parts end depends on the sizes of the files alone. A stretch is given in bytes; the records that begin in it
are its records, so a reader finds the first and the last one by itself.
"""

import io
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fsspec.core import url_to_fs

from data_scoring.base.files import fingerprint
from data_scoring.config import SourceConfig
from data_scoring.corpus.source_files import is_stored_plain, open_file

# More text than this takes longer to read than starting processes.
LONG_BYTES = 64 << 20
# Formats whose text is one stream, even if it has files.
STREAMS = ("python", "datasets")
# A part is worked on by one process: small enough that many processes have work, large enough that there are not too
# many parts.
_SMALLEST_PART_BYTES = 16 << 20
_LARGEST_PART_BYTES = 1 << 30
_NUM_PARTS = 4096
# Version of what is read from the parts.
_FORMAT = 1
_HEAD_BYTES = 1 << 16
_CHUNK_BYTES = 1 << 20
# Where a stretch may begin: after a line; after the first two line breaks of several.
_ENDS = {"line": re.compile(rb"\n"), "paragraph": re.compile(rb"[^\r\n](?:\n\n|\r\n\r\n)")}
_LONGEST_END = 5


@dataclass(frozen=True)
class Piece:
    """A file, or the stretch of it from byte `start` to byte `stop`; None: to its end."""

    file: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class SourcePart:
    """A part of a source: pieces of its files, read in order.

    kind: the format of the files. number: from 0, in the order of the source's documents. num_bytes: the size of the
    pieces as they are stored; 0 if it is not known. files: the state of the files that are read. identity: a
    fingerprint of the source's configuration, of the pieces and of that state.
    """

    source: SourceConfig
    kind: str
    number: int
    pieces: tuple[Piece, ...]
    num_bytes: int
    files: tuple["StoredFile", ...]
    identity: str

    @property
    def name(self) -> str:
        """Return the stem of the names of the part's files."""
        return f"{self.source.name}.{self.number:05d}"


@dataclass(frozen=True)
class StoredFile:
    """A file of a source: its name, its size in bytes, and a stamp that changes when it is written to."""

    name: str
    num_bytes: int
    stamp: str


def stored_file(name: str, is_listed: bool = True) -> StoredFile:
    """Return the current state of a file, which may be remote.

    is_listed: whether what its folder's listing said is good enough, if this process has listed it.
    """
    if Path(name).exists():
        stat = Path(name).stat()
        return StoredFile(name, stat.st_size, str(stat.st_mtime_ns))
    fs, path = url_to_fs(name)
    if not is_listed:
        fs.invalidate_cache(path)
    info = fs.info(path)
    # One stamp: some stores give more digits of a time in a listing than for a single file.
    stamps = [str(info[key]) for key in ("ETag", "etag", "mtime", "LastModified", "last_modified") if info.get(key)]
    return StoredFile(name, int(info.get("size") or 0), stamps[0] if stamps else "")


def part_bytes(total: int) -> int:
    """Return the size of parts for `total` bytes of files."""
    return min(max(total // _NUM_PARTS, _SMALLEST_PART_BYTES), _LARGEST_PART_BYTES)


def cut_source(source: SourceConfig, kind: str, files: Sequence[StoredFile], size: int) -> list[SourcePart]:
    """Return the parts, of about `size` bytes, of a source of the format `kind` with these files."""
    if kind in STREAMS:
        groups = [[Piece(source.path)]]
    elif source.max_documents is not None:
        # The last document that is read depends on all before it.
        groups = [[Piece(file.name) for file in files]]
    else:
        groups = list(_group(source, kind, files, size))
    stored = {file.name: file for file in files}
    parts = []
    for number, pieces in enumerate(groups):
        read = [*files] if kind in STREAMS else [stored[each.file] for each in pieces]
        places = [(each.file, each.start, each.stop) for each in pieces]
        stamps = [(file.num_bytes, file.stamp) for file in read]
        # Python's own text differs between versions.
        identity = fingerprint(source.model_dump(), places, stamps, sys.version, _FORMAT)
        sizes = [file.num_bytes if each.stop is None else each.stop for file, each in zip(read, pieces, strict=False)]
        num_bytes = sum(size - each.start for size, each in zip(sizes, pieces, strict=False))
        parts.append(SourcePart(source, kind, number, tuple(pieces), num_bytes, tuple(read), identity))
    return parts


def _group(source: SourceConfig, kind: str, files: Sequence[StoredFile], size: int) -> Iterator[list[Piece]]:
    group: list[Piece] = []
    filled = 0
    for file in files:
        if group and (filled + file.num_bytes > size):
            yield group
            group, filled = [], 0
        if file.num_bytes > size and _can_cut(source, kind, file.name):
            count = -(-file.num_bytes // size)
            bounds = [file.num_bytes * number // count for number in range(count)]
            for start, stop in zip(bounds, [*bounds[1:], None], strict=True):
                yield [Piece(file.name, start, stop)]
        else:
            group.append(Piece(file.name))
            filled += file.num_bytes
    if group:
        yield group


def _can_cut(source: SourceConfig, kind: str, file: str) -> bool:
    """Return whether stretches of a file can be read independently of each other."""
    if kind == "parquet":
        return True
    if kind == "text" and source.document == "file":
        return False
    with open_file(file) as opened:
        head = opened.read(_HEAD_BYTES)
    if not is_stored_plain(file, head):
        return False
    # Elements of a JSON array may be on any number of lines; blank lines may be before one.
    return kind == "text" or head.removeprefix(b"\xef\xbb\xbf").startswith(b"{")


def open_stretch(piece: Piece, unit: str) -> IO[bytes]:
    """Return the records that begin in the bytes of `piece`, as a stream of bytes."""
    file = open_file(piece.file)
    start = _first_end(file, piece.start, unit)
    stop = None if piece.stop is None else _first_end(file, piece.stop, unit)
    file.seek(start)
    return io.BufferedReader(_Stretch(file, None if stop is None else stop - start), _CHUNK_BYTES)


def _first_end(file: IO[bytes], place: int, unit: str) -> int:
    """Return the place after the first end of a record that is at `place` or later; the size of the file without one.

    A record ends at `place` if it does so just before: a stretch that begins there begins with a record.
    """
    if place == 0:
        return 0
    start = max(0, place - _LONGEST_END)
    file.seek(start)
    block = b""
    while chunk := file.read(_CHUNK_BYTES):
        block += chunk
        for found in _ENDS[unit].finditer(block):
            if start + found.end() >= place:
                return start + found.end()
        kept = block[-_LONGEST_END:]
        start, block = start + len(block) - len(kept), kept
    return start + len(block)


class _Stretch(io.RawIOBase):
    """The next `size` bytes of a file; None: all that follow."""

    def __init__(self, file: IO[bytes], size: int | None) -> None:
        self._file, self._left = file, size

    def readable(self) -> bool:
        """Return that this file can be read."""
        return True

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]
        """Fill `buffer` and return the number of bytes; 0 at the end."""
        size = len(buffer) if self._left is None else min(len(buffer), self._left)
        data = self._file.read(size)
        buffer[: len(data)] = data
        if self._left is not None:
            self._left -= len(data)
        return len(data)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()
