"""Checkpoints on disk: which a folder holds, and whether their files are what was written; told without Megatron."""

import os
import shutil
import zlib
from pathlib import Path
from typing import Any

from data_scoring.files import commit, read_json, write_json

RECORD = "reprise.json"
_MEASURED = ".measured-"
_BLOCK_BYTES = 1 << 20


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / RECORD).exists())


def read_checkpoint_record(checkpoint: Path) -> dict[str, Any]:
    """Return what was recorded with a checkpoint: its step, its files' checksums and what the saver added."""
    record: dict[str, Any] = read_json(checkpoint / RECORD)
    return record


def measure_files(checkpoint: Path, names: list[str], part: str) -> None:
    """Note sizes and checksums of the files `names`, just written, in `checkpoint`, for `seal_checkpoint` to collect.

    Each is read twice: as the system remembers it, and as the disk returns it, where the system can be told to
    forget. `part` tells apart the notes of the processes that share the work.
    """
    files, changed = {}, []
    for name in names:
        measured = _measure(checkpoint / name)
        files[name] = {"bytes": measured[0], "crc32": measured[1]}
        _forget(checkpoint / name)
        if _measure(checkpoint / name) != measured:
            changed.append(name)
    write_json(checkpoint / f"{_MEASURED}{part}.json", {"files": files, "changed": changed})


def seal_checkpoint(checkpoint: Path, record: dict[str, Any]) -> None:
    """Write `record` beside the files of a checkpoint, with the size and checksum of each, which completes it.

    Raises ValueError where the disk does not return what was written to it.
    """
    (checkpoint / RECORD).unlink(missing_ok=True)
    files, changed = _collect_measured(checkpoint)
    measure_files(checkpoint, sorted({path.name for path in checkpoint.iterdir()} - files.keys()), "rest")
    rest, changed_rest = _collect_measured(checkpoint)
    changed += changed_rest
    if changed:
        raise ValueError(
            f"{checkpoint / changed[0]}: the disk does not return what was written to it; the checkpoints before are "
            "kept; check the disk, then the same command goes on from them"
        )
    write_json(checkpoint / RECORD, {**record, "files": dict(sorted({**files, **rest}.items()))})


def _collect_measured(checkpoint: Path) -> tuple[dict[str, Any], list[str]]:
    """Return what `measure_files` has noted, and remove its notes."""
    files: dict[str, Any] = {}
    changed: list[str] = []
    for path in checkpoint.glob(f"{_MEASURED}*.json"):
        measured = read_json(path)
        files |= measured["files"]
        changed += measured["changed"]
        path.unlink()
    return files, changed


def complete_checkpoint(temporary: Path, target: Path, record: dict[str, Any], keep_last: int) -> None:
    """Make the checkpoint written as `temporary` appear, sealed, at `target`, then drop all but the last `keep_last`.

    Raises ValueError, leaving the older ones, where the disk does not return what was written to it.
    """
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
