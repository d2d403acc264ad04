"""Checkpoints on disk: which a folder holds, and whether their files are what was written; told without Megatron."""

import io
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from data_scoring.base.files import commit, read_json, write_json

RECORD = "reprise.json"
_MEASURED = ".measured-"
_BLOCK_BYTES = 1 << 20
# What ranks that save nothing, or little, get to end once they are told to stop.
SECONDS_TO_STOP = 20.0
# The least that a disk, perhaps one of the network, is taken to write or to read a second.
_SLOWEST_BYTES_A_SECOND = 400e6
# A checkpoint that was being written is finished before the last one: each is written and read back.
_PASSES = 4


def seconds_to_stop(num_bytes: int) -> float:
    """Return what ranks that train get to save a checkpoint of so many bytes and end, once they are told to stop."""
    return SECONDS_TO_STOP + _PASSES * num_bytes / _SLOWEST_BYTES_A_SECOND


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / RECORD).exists())


def read_checkpoint_record(checkpoint: Path) -> dict[str, Any]:
    """Return what was recorded with a checkpoint: its step, its files' checksums and what the saver added."""
    record: dict[str, Any] = read_json(checkpoint / RECORD)
    return record


class _MeasuredFile(io.BufferedWriter):
    """A new file that keeps the checksum of what is written to it, one thing after another."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "w"), _BLOCK_BYTES)
        self.num_bytes = self.crc32 = 0

    def write(self, data: Any) -> int:
        """Write `data`, bytes or a view of them, and take it into the checksum."""
        self.crc32 = zlib.crc32(data, self.crc32)
        self.num_bytes += memoryview(data).nbytes
        return super().write(data)


@contextmanager
def writing_measured(path: str | Path, mode: str = "wb") -> Iterator[BinaryIO]:
    """Yield the new file `path` of a checkpoint to write, front to back; note its size and checksum when it is closed.

    What the disk returns is held against them, where the system can be told to forget. `seal_checkpoint` collects the
    notes, whoever wrote the files.
    """
    assert mode == "wb"
    path = Path(path)
    with _MeasuredFile(path) as file:
        yield cast(BinaryIO, file)
    _note(path, (file.num_bytes, file.crc32))


def _note(path: Path, measured: tuple[int, int]) -> None:
    """Note what was written to a file, and whether the disk returns it."""
    _forget(path)
    entry = {"bytes": measured[0], "crc32": measured[1], "is_changed": _measure(path) != measured}
    write_json(_note_path(path), {path.name: entry})


def _note_path(path: Path) -> Path:
    return path.with_name(f"{_MEASURED}{path.name}.json")


def seal_checkpoint(checkpoint: Path, record: dict[str, Any]) -> None:
    """Write `record` beside the files of a checkpoint, with the size and checksum of each, which completes it.

    Raises ValueError where the disk does not return what was written to it.
    """
    (checkpoint / RECORD).unlink(missing_ok=True)
    # Files that were not measured while they were written: small ones, and those of whoever copies a checkpoint.
    for path in list(checkpoint.iterdir()):
        if not path.name.startswith(_MEASURED) and not _note_path(path).exists():
            _note(path, _measure(path))
    files: dict[str, Any] = {}
    for path in checkpoint.glob(f"{_MEASURED}*.json"):
        files |= read_json(path)
        path.unlink()
    changed = sorted(name for name, entry in files.items() if entry.pop("is_changed"))
    if changed:
        raise ValueError(
            f"{checkpoint / changed[0]}: the disk does not return what was written to it; the checkpoints before are "
            "kept; check the disk, then the same command goes on from them"
        )
    write_json(checkpoint / RECORD, {**record, "files": dict(sorted(files.items()))})


def complete_checkpoint(
    temporary: Path, target: Path, record: dict[str, Any], keep_last: int, names: Iterable[str] = ()
) -> None:
    """Make the checkpoint written as `temporary` appear, sealed, at `target`, then drop all but the last `keep_last`.

    names: the files that ranks wrote. Raises ValueError, leaving the older ones, where one of them is not there, or the
    disk does not return what was written to it.
    """
    for name in names:
        path = temporary / name
        if not (path.exists() and _note_path(path).exists()):
            raise ValueError(
                f"{path}: a rank wrote it, and it is not there for the first rank; the checkpoints before "
                "are kept; put the run's folder on a disk that all hosts share"
            )
    seal_checkpoint(temporary, record)
    # Training that went back to an older checkpoint reaches the same step again.
    shutil.rmtree(target, ignore_errors=True)
    commit(temporary, target)
    for old in list_checkpoints(target.parent)[:-keep_last]:
        shutil.rmtree(old)


def find_damage(checkpoint: Path, part: int = 0, parts: int = 1) -> str | None:
    """Return what is wrong with a checkpoint's files, in words, or None; `part` of `parts` looks at its share alone."""
    try:
        files = read_checkpoint_record(checkpoint)["files"]
        sizes = {str(name): (int(entry["bytes"]), int(entry["crc32"])) for name, entry in files.items()}
    except ValueError:
        return f"{RECORD} is not valid JSON"
    except (LookupError, TypeError, AttributeError):
        return f"{RECORD} holds no checksums, as those of version 0.1 did not"
    for name in sorted(sizes)[part::parts]:
        path = checkpoint / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != sizes[name][0]:
            return f"{name} has {path.stat().st_size:,} bytes instead of {sizes[name][0]:,}"
        if _measure(path) != sizes[name]:
            return f"{name} is not what was written"
    return None


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint such that it is none any more, and return its new path."""
    aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return checkpoint.rename(aside)


def _measure(path: Path) -> tuple[int, int]:
    """Return a file's size in bytes and its CRC-32."""
    size = crc32 = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            size, crc32 = size + len(block), zlib.crc32(block, crc32)
    return size, crc32


def _forget(path: Path) -> None:
    """Make the system write a file to the disk and drop what it remembers of it, where it knows how to."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
