"""Checkpoints on disk: listing, checksums and atomic completion, without Megatron."""

import io
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO, cast

from pydantic import Field
from typing_extensions import TypedDict

from data_scoring.base.field_types import Count, PathText
from data_scoring.base.files import commit, write_json, write_record
from data_scoring.base.validation import read_record

RECORD = "reprise.json"
_REMEDY = "restore the checkpoint from a copy, or delete it"
_MEASURED = ".measured-"
_BLOCK_BYTES = 1 << 20
# Time that ranks with little or nothing to save have to end after a stop request.
SECONDS_TO_STOP = 20.0
# Assumed lower bound of a disk's read and write speed, network disks included.
_SLOWEST_BYTES_A_SECOND = 400e6
# A checkpoint in progress is finished before the last one is saved; each is written and read back.
_PASSES = 4


def seconds_to_stop(num_bytes: int) -> float:
    """Return the seconds that training ranks have, after a stop request, to save `num_bytes` and end."""
    return SECONDS_TO_STOP + _PASSES * num_bytes / _SLOWEST_BYTES_A_SECOND


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / RECORD).exists())


class _File(TypedDict):
    bytes: Count
    crc32: Count


class _MeasuredFileRecord(_File):
    is_changed: bool


class LogDigests(TypedDict, total=False):
    """Digests of the rows that were recorded before a checkpoint, and of files of seen losses."""

    steps: str
    validation: str
    seen: dict[str, str]


class CheckpointRecord(TypedDict, total=False):
    """The record of a checkpoint; earlier versions and imports lack some of these fields."""

    fingerprint: str
    step: Count
    num_steps: Count
    vocab_size: Annotated[int, Field(ge=1, le=2**31)]
    is_validation_due: bool
    logs: LogDigests
    files: dict[PathText, _File | Count]  # only sizes in version 0.1


def read_checkpoint_record(checkpoint: Path, *needed: str) -> CheckpointRecord:
    """Return the record of a checkpoint: its step, its files' checksums and the saver's entries.

    Raises ValueError if the record is missing or damaged, or lacks one of the fields `needed`.
    """
    path = checkpoint / RECORD
    record = read_record(path, CheckpointRecord, _REMEDY)
    if record is None:
        raise ValueError(f"{path}: no such file; {_REMEDY}")
    for field in needed:
        if field not in record:
            raise ValueError(f"{path}: {field}: field required; {_REMEDY}")
    return record


def check_checkpoints(folder: Path, fingerprint: str) -> None:
    """Raise ValueError if a checkpoint in `folder` is not of the training with this `fingerprint`."""
    for path in list_checkpoints(folder):
        try:
            found = read_checkpoint_record(path).get("fingerprint", fingerprint)
        except ValueError:
            continue  # Training sets damaged checkpoints aside.
        if found != fingerprint:
            raise ValueError(
                f"{path}: was trained with another configuration, corpus, mix or initial checkpoint; restore these, or "
                f"move {folder} away, and the same command trains the round again"
            )


class _MeasuredFile(io.BufferedWriter):
    """A new file that computes the checksum of the data written to it, in sequence."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "w"), _BLOCK_BYTES)
        self.num_bytes = self.crc32 = 0

    def write(self, data: Any) -> int:
        """Write `data`, bytes or a view of them, and update the checksum."""
        self.crc32 = zlib.crc32(data, self.crc32)
        self.num_bytes += memoryview(data).nbytes
        return super().write(data)


@contextmanager
def writing_measured(path: str | Path, mode: str = "wb") -> Iterator[BinaryIO]:
    """Yield the new file `path` of a checkpoint for sequential writing; record its size and checksum on closing.

    The file is then read back and compared with them, bypassing the page cache if possible. `seal_checkpoint` collects
    the records, whichever process wrote the files.
    """
    assert mode == "wb"
    path = Path(path)
    with _MeasuredFile(path) as file:
        yield cast(BinaryIO, file)
    _note(path, (file.num_bytes, file.crc32))


def _note(path: Path, measured: tuple[int, int]) -> None:
    """Record the size and checksum of a written file, and whether reading it back gives the same."""
    _drop_from_cache(path)
    entry = {"bytes": measured[0], "crc32": measured[1], "is_changed": _measure(path) != measured}
    write_json(_note_path(path), {path.name: entry})


def _note_path(path: Path) -> Path:
    return path.with_name(f"{_MEASURED}{path.name}.json")


def seal_checkpoint(checkpoint: Path, record: dict[str, Any]) -> None:
    """Complete a checkpoint by writing `record`, with the size and checksum of each file, beside its files.

    Raises ValueError if the disk does not return what was written to it.
    """
    (checkpoint / RECORD).unlink(missing_ok=True)
    # Files not measured during writing: small ones, and files of copied checkpoints.
    for path in list(checkpoint.iterdir()):
        if not path.name.startswith(_MEASURED) and not _note_path(path).exists():
            _note(path, _measure(path))
    files: dict[str, Any] = {}
    for path in checkpoint.glob(f"{_MEASURED}*.json"):
        files |= read_record(path, dict[str, _MeasuredFileRecord]) or {}
        path.unlink()
    changed = sorted(name for name, entry in files.items() if entry.pop("is_changed"))
    if changed:
        raise ValueError(
            f"{checkpoint / changed[0]}: the disk does not return what was written to it; earlier checkpoints are "
            "kept; check the disk, then run the same command again to resume from them"
        )
    write_record(checkpoint / RECORD, {**record, "files": dict(sorted(files.items()))})


def complete_checkpoint(
    temporary: Path, target: Path, record: dict[str, Any], keep_last: int, names: Iterable[str] = ()
) -> None:
    """Seal the checkpoint in `temporary`, move it to `target`, then delete all but the last `keep_last`.

    names: the files that ranks wrote. Raises ValueError, keeping the older checkpoints, if one of these files is
    missing or does not read back as written.
    """
    for name in names:
        path = temporary / name
        if not (path.exists() and _note_path(path).exists()):
            raise ValueError(
                f"{path}: written by a rank, but missing on the first rank; earlier checkpoints are kept; "
                "put the run's folder on a disk that all hosts share"
            )
    seal_checkpoint(temporary, record)
    # Training resumed from an older checkpoint reaches the same step again.
    shutil.rmtree(target, ignore_errors=True)
    commit(temporary, target)
    for old in list_checkpoints(target.parent)[:-keep_last]:
        shutil.rmtree(old)


def find_damage(checkpoint: Path, part: int = 0, parts: int = 1) -> str | None:
    """Return what is wrong with a checkpoint's files, or None; with `parts`, check only share `part` of the files."""
    try:
        record = read_checkpoint_record(checkpoint)
    except ValueError:
        return f"{RECORD} is damaged"
    files = record.get("files", {})
    sizes = {name: (entry["bytes"], entry["crc32"]) for name, entry in files.items() if not isinstance(entry, int)}
    if len(sizes) < len(files) or "files" not in record:
        return f"{RECORD} has no checksums, as in version 0.1"
    unlisted = sorted({path.name for path in checkpoint.iterdir()} - {RECORD} - sizes.keys())
    if unlisted or not sizes:
        return f"{RECORD} does not list {unlisted[0] if unlisted else 'any file'}"
    found = (_damage_of(checkpoint / name, sizes[name]) for name in sorted(sizes)[part::parts])
    return next((damage for damage in found if damage is not None), None)


def _damage_of(path: Path, expected: tuple[int, int]) -> str | None:
    """Return what is wrong with a file of the size and checksum `expected`, or None."""
    if not path.exists():
        return f"{path.name} is missing"
    if path.stat().st_size != expected[0]:
        return f"{path.name} has {path.stat().st_size:,} bytes instead of {expected[0]:,}"
    return f"{path.name} differs from what was written" if _measure(path) != expected else None


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint so that it is no longer listed, and return its new path."""
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


def _drop_from_cache(path: Path) -> None:
    """Flush a file to the disk and drop it from the page cache, where the system supports this."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
