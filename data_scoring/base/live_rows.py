"""Rows of a Parquet file that are not in it yet: the file is rewritten at checkpoints, others want to see every row."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import pyarrow.compute as pc

from data_scoring.base.parquet import parquet_fingerprint, read_parquet


class LiveRows:
    """The rows of the Parquet file `path` since it was last written, as lines of JSON in a file beside it.

    The first line holds the fingerprint. Rows are flushed but not fsynced: those of a crash are computed again.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        """Delete the rows that an earlier process left."""
        self._path, self._fingerprint = live_path(path), fingerprint
        self._file: TextIO | None = None
        self._path.unlink(missing_ok=True)

    def append(self, row: dict[str, Any]) -> None:
        """Add a row, which other processes can read at once."""
        if self._file is None:
            self._file = self._path.open("w", encoding="utf-8")
            self._file.write(f"{json.dumps({'fingerprint': self._fingerprint})}\n")
        self._file.write(f"{json.dumps(row, default=datetime.isoformat)}\n")
        self._file.flush()

    def clear(self) -> None:
        """Delete the rows, once they are in the Parquet file."""
        if self._file is not None:
            self._file.close()
            self._file = None
            self._path.unlink(missing_ok=True)


def live_path(path: Path) -> Path:
    """Return the path of the rows that are not in the Parquet file `path` yet."""
    return path.with_suffix(".live.jsonl")


def read_live_rows(path: Path, skip: int = 0) -> tuple[str | None, list[dict[str, Any]]]:
    """Return the fingerprint and the rows of the Parquet file `path`, by `step`, with those that are not in it yet.

    skip: the number of first rows that are left out. The fingerprint is None, and there are no rows, if there is no
    file. Rows that were computed again after a crash occur once. Raises ValueError if the Parquet file is damaged.
    """
    # First the file whose rows move to the other one, so that none is missed.
    newer, fresh = _read_fresh(live_path(path))
    older = parquet_fingerprint(path)
    if older is None or newer not in (None, older):
        return newer, fresh[skip:]
    table = read_parquet(path)
    if fresh:
        table = table.filter(pc.less(table["step"], fresh[0]["step"]))
    return older, [*table.slice(skip).to_pylist(), *fresh[max(0, skip - len(table)) :]]


def _read_fresh(path: Path) -> tuple[str | None, list[dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (FileNotFoundError, UnicodeDecodeError):
        return None, []
    # What follows the last line break is still being written.
    try:
        head, *rows = [json.loads(line) for line in lines[:-1]]
    except ValueError:
        return None, []
    for row in rows:
        if "ended_at" in row:
            row["ended_at"] = datetime.fromisoformat(row["ended_at"])
    return str(head["fingerprint"]), rows
