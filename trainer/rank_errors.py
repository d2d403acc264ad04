"""The errors that ranks write for their launcher, one file per rank."""

import json
import math
import os
import signal
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from data_scoring.base.files import read_json
from data_scoring.base.validation import validated

_RESERVED_BYTES = 1 << 16


@dataclass(frozen=True)
class RankError:
    """Why a rank failed.

    kind: the exception's class, or the name of the signal that ended the rank, such as SIGKILL.
    is_user_error: whether `message` tells the user what to change.
    is_killed: whether a signal ended the rank.
    """

    rank: int
    time: float
    kind: str
    is_user_error: bool
    message: str
    traceback: str = ""
    is_killed: bool = False


def reserve_space(folder: Path, rank: int) -> None:
    """Reserve disk space in `folder`, which must exist, for the error of a rank: it may be that the disk is full."""
    descriptor = os.open(_reserved(folder, rank), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        # Written, not only allocated, since not all file systems support that.
        os.write(descriptor, bytes(_RESERVED_BYTES))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def release_space(folder: Path, rank: int | None = None) -> None:
    """Release the space that a rank reserved in `folder`, by default every rank, including ranks that were killed."""
    for path in folder.glob(".rank-*.reserved") if rank is None else [_reserved(folder, rank)]:
        path.unlink(missing_ok=True)


def leave_error(folder: Path, error: RankError) -> None:
    """Write the error of a rank into `folder`, which must exist, using the reserved space."""
    temporary = _reserved(folder, error.rank)
    # JSON takes up to six bytes per character.
    kept = _RESERVED_BYTES // 14
    shortened = replace(error, message=error.message[:kept], traceback=error.traceback[-kept:])
    content = json.dumps(asdict(shortened)).encode()
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.pwrite(descriptor, content, 0)
        os.ftruncate(descriptor, len(content))
    finally:
        os.close(descriptor)
    temporary.rename(folder / f"rank-{error.rank:05d}.json")


def _reserved(folder: Path, rank: int) -> Path:
    return folder / f".rank-{rank:05d}.reserved"


def killed(rank: int, signal_number: int, time: float) -> RankError:
    """Return the error of a rank that a signal killed at `time`, in seconds since the epoch."""
    name = signal.Signals(signal_number).name
    cause = " (out of memory?)" if signal_number == signal.SIGKILL else ""
    message = f"rank {rank} was killed by {name}{cause}"
    return RankError(rank, time, name, is_user_error=False, message=message, is_killed=True)


def root_cause(folder: Path) -> RankError | None:
    """Return the error in `folder` that caused the others, or None if there are none.

    An error that the user can fix comes first, then a killed rank, since the others only report that they lost it.
    Among equals, the earliest comes first.
    """
    return min(map(_read_error, folder.glob("rank-*.json")), key=_precedence, default=None)


def _read_error(path: Path) -> RankError:
    try:
        content = read_json(path, "see the log")
        # Versions before 0.8 wrote is_user_error under this name; a run that failed then still shows its error.
        if isinstance(content, dict) and "is_users" in content:
            content["is_user_error"] = content.pop("is_users")
        return validated(RankError, content, path, "see the log")
    except ValueError as error:
        # The record of another rank may be intact, and comes first.
        return RankError(0, math.inf, "damaged record", is_user_error=False, message=str(error))


def errors_beside(job_path: Path) -> Path:
    """Return the folder of the errors of ranks whose job cannot be read: the launcher's, beside the job."""
    return job_path.with_name("errors")


def _precedence(error: RankError) -> tuple[bool, bool, float]:
    # A rank aborts itself after it has lost another rank.
    is_cause = error.is_killed and error.kind != "SIGABRT"
    return not error.is_user_error, not is_cause, error.time
