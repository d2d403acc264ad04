"""Progress callbacks: long-running work reports to a callable and does not know what displays it."""

import json
import time
from collections.abc import Callable
from pathlib import Path

# Called with (description of the work, units done, total units or None if unknown).
Progress = Callable[[str, int, int | None], None]


def silent(what: str, done: int, total: int | None) -> None:
    """Ignore progress."""


class ProgressFile:
    """A progress callback that writes a small JSON file for other processes, at most twice a second."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last = 0.0
        self.details: dict[str, float] = {}

    def __call__(self, what: str, done: int, total: int | None) -> None:
        """Record that `done` of `total` units are done; the last unit is always written."""
        now = time.monotonic()
        if done != total and now - self._last < 0.5:
            return
        self._last = now
        # Renamed but not fsynced: readers never see a partial file, and losing it in a crash does no harm.
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        temporary.write_text(json.dumps({"what": what, "done": done, "total": total, **self.details}))
        temporary.rename(self._path)
