"""The files that a source's path names, and their content, decompressed."""

import bz2
import fnmatch
import gzip
import io
import lzma
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
from fsspec.core import url_to_fs

_CODECS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd", ".lz4": "lz4", ".zip": "zip"}
_FORMAT_OF_ENDING = {
    ".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet",
    ".txt": "text", ".text": "text", ".md": "text", ".rst": "text", ".bin": "megatron", ".idx": "megatron",
}  # fmt: skip
# Regular expressions; those of zstd include frames that are skipped.
_MAGIC_NUMBERS = {
    "gzip": rb"\x1f\x8b\x08",
    "bz2": rb"BZh[1-9]1AY&SY",
    "xz": rb"\xfd7zXZ\x00",
    "zstd": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",
    "lz4": rb"\x04\x22\x4d\x18",
    "zip": rb"PK\x03\x04",
}
_WILDCARDS = re.compile(r"[*?[]")
_CHUNK_BYTES = 1 << 20
_REMOTE_BLOCK_BYTES = 8 << 20


def match_path(path: str) -> list[str]:
    """Return the names of the files that `path` names, sorted.

    A path that exists is that file or folder, whatever characters it has; any other may be a pattern. A folder, or one
    that a pattern matches, stands for the files at any depth below it, except hidden ones. Linked folders are followed.
    """
    if "://" in path and not Path(path).exists():
        return _match_url(path)
    place = Path(path).expanduser()
    if place.is_dir():
        return sorted(_files_below([str(place)]))
    if place.is_file():
        return [str(place.absolute())]
    if not has_wildcards(path):
        return []
    parts = place.absolute().parts
    matches = set(_match_parts(parts[0], parts[1:]))
    folders = sorted(name for name in matches if Path(name).is_dir())
    # Links last: a folder that is reachable without one keeps the name that it has without.
    folders.sort(key=os.path.islink)
    return _distinct({name for name in matches if Path(name).is_file()}.union(_files_below(folders)))


def _distinct(names: set[str]) -> list[str]:
    """Return `names`, sorted, without those that lead through links to the folder of another one."""
    real = {folder: os.path.realpath(folder) for folder in {os.path.dirname(name) for name in names}}  # noqa: PTH120
    kept: dict[tuple[str, str], str] = {}
    for name in sorted(names, key=lambda name: (name.count("/"), name)):
        folder, file = os.path.split(name)
        if folder == real[folder]:
            kept[real[folder], file] = name
        else:
            kept.setdefault((real[folder], file), name)
    return sorted(kept.values())


def has_wildcards(path: str) -> bool:
    """Return whether `path` has a character that is special in patterns."""
    return _WILDCARDS.search(path) is not None


def _match_parts(root: str, parts: Sequence[str]) -> Iterator[str]:
    """Yield the names below `root` that match the pattern `parts`, one for each level."""
    if not parts:
        yield root
        return
    part, rest = parts[0], parts[1:]
    place = os.path.join(root, part)  # noqa: PTH118 - names may have bytes that are not UTF-8
    # Brackets may be part of a name. A name with an asterisk or question mark matches itself.
    if not has_wildcards(part) or (os.path.lexists(place) and not re.search("[*?]", part)):
        if os.path.lexists(place):
            yield from _match_parts(place, rest)
    elif part == "**":
        for folder, _ in _walk([root] if Path(root).is_dir() else []):
            yield from _match_parts(folder, rest or ["*"])
    elif Path(root).is_dir():
        for name in os.listdir(root):  # noqa: PTH208
            if fnmatch.fnmatchcase(name, part):
                yield from _match_parts(os.path.join(root, name), rest)  # noqa: PTH118


def _files_below(folders: Sequence[str]) -> Iterator[str]:
    """Yield the files below `folders`, without hidden ones."""
    for folder, names in _walk(folders):
        for name in names:
            path = os.path.join(folder, name)  # noqa: PTH118
            if name[0] != "." and Path(path).is_file():
                yield path


def _walk(folders: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder below `folders`, and these, once, with the names of its files; linked folders come last.

    Raises OSError for a folder that cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    seen: set[tuple[int, int]] = set()
    waiting = list(folders)
    while waiting:
        links: list[str] = []
        for place in waiting:
            for folder, subfolders, files in os.walk(place, onerror=fail):
                stat = Path(folder).stat()
                if (stat.st_dev, stat.st_ino) in seen:
                    # Links may point to one folder twice, or to one above.
                    subfolders.clear()
                    continue
                seen.add((stat.st_dev, stat.st_ino))
                yield folder, files
                below = [os.path.join(folder, name) for name in subfolders]  # noqa: PTH118
                links += [name for name in below if os.path.islink(name)]  # noqa: PTH114
        waiting = sorted(links)


def _match_url(url: str) -> list[str]:
    fs, path = url_to_fs(url)
    # A listing of this process' past lacks files that were added since.
    fs.invalidate_cache()
    names = [path] if fs.exists(path) else fs.glob(path) if has_wildcards(path) else []
    files = {file for name in names for file in (fs.find(name) if fs.info(name)["type"] == "directory" else [name])}
    # What follows in a chain, such as zip://*.jsonl::a.zip, is lost in the file system's own names.
    _, chain, rest = url.partition("::")
    return sorted(f"{fs.unstrip_protocol(file)}{chain}{rest}" for file in files)


def format_of(name: str) -> str | None:
    """Return the format that a file's name ends with, compressed or not; None if its ending is not a known one."""
    return _FORMAT_OF_ENDING.get(ending_of(name))


def ending_of(name: str) -> str:
    """Return the ending of a file's name in lower case, without that of a compression."""
    endings = [ending.lower() for ending in Path(name).suffixes if ending.lower() not in _CODECS]
    return endings[-1] if endings else ""


def open_file(name: str) -> IO[bytes]:
    """Return a file of `match_path`, opened, as it is stored."""
    if Path(name).exists():
        return Path(name).open("rb")
    fs, path = url_to_fs(name)
    # Parts of a file are read independently: no more is read ahead than that.
    file: IO[bytes] = fs.open(path, "rb", block_size=_REMOTE_BLOCK_BYTES)
    return file


def is_stored_plain(name: str, head: bytes) -> bool:
    """Return whether the content of a file is what it stores, given its first bytes: it is not compressed."""
    return _codec_of(name) is None and _codec_in(head) is None


def _codec_of(name: str) -> str | None:
    return _CODECS.get(Path(name).suffix.lower())


def _codec_in(head: bytes) -> str | None:
    return next((each for each, magic in _MAGIC_NUMBERS.items() if re.match(magic, head)), None)


def open_contents(name: str) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield names and contents of a file, decompressed, as binary streams: one, or those of a zip archive's members.

    How it is compressed is told by the name's ending, or by the content if the ending is not a known one. Reading a
    stream raises an exception if the content is damaged or cut short.
    """
    with io.BufferedReader(open_file(name), _CHUNK_BYTES) as file:  # type: ignore[type-var]
        codec, found = _codec_of(name), _codec_in(file.peek(16))
        if codec is None and found is not None and format_of(name) is not None:
            ending = next(ending for ending, each in _CODECS.items() if each == found)
            raise ValueError(f"it is compressed; rename it so that its name ends in {ending}")
        if (codec or found) == "zip":
            with zipfile.ZipFile(file) as archive:
                for member in archive.infolist():
                    if not member.is_dir():
                        with archive.open(member) as content:
                            yield f"{name}/{member.filename}", _decompressed(content, _codec_of(member.filename))
        else:
            yield name, _decompressed(file, codec or found)


def _decompressed(file: IO[bytes], codec: str | None) -> IO[bytes]:
    if codec is None:
        return file
    raw: Any
    if codec == "gzip":
        raw = gzip.GzipFile(fileobj=file)
    elif codec == "bz2":
        raw = _Streams(file, bz2.BZ2Decompressor)
    elif codec == "xz":
        raw = _Streams(file, lzma.LZMADecompressor)
    else:
        raw = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), codec)
    return io.BufferedReader(raw, _CHUNK_BYTES)


class _Streams(io.RawIOBase):
    """The decompressed content of a file of one or more streams, possibly padded with zeros.

    Raises EOFError if the file is cut short, and the library's error for anything that is not a stream. The library's
    own files take a damaged stream for the end of the file, unless it is the first one.
    """

    def __init__(self, file: IO[bytes], start: Callable[[], Any]) -> None:
        self._file, self._start = file, start
        self._decompressor = start()

    def readable(self) -> bool:
        """Return that this file can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` and return the number of bytes; 0 at the end."""
        while True:
            if self._decompressor.eof:
                rest = self._decompressor.unused_data.lstrip(b"\0")
                while not rest:
                    if not (chunk := self._file.read(_CHUNK_BYTES)):
                        return 0
                    rest = chunk.lstrip(b"\0")
                self._decompressor = self._start()
                data = self._decompressor.decompress(rest, len(buffer))
            elif self._decompressor.needs_input:
                if not (chunk := self._file.read(_CHUNK_BYTES)):
                    raise EOFError("the file is cut short")
                data = self._decompressor.decompress(chunk, len(buffer))
            else:
                data = self._decompressor.decompress(b"", len(buffer))
            if data:
                buffer[: len(data)] = data
                return len(data)
