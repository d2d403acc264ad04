"""Progress callbacks: long-running work reports to a callable and does not know what displays it."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_scoring.base.files import read_json

# Called with (description of the work, units done, total units or None if unknown).
Progress = Callable[[str, int, int | None], None]


def silent(what: str, done: int, total: int | None) -> None:
    """Ignore progress."""


@dataclass(frozen=True)
class Reported:
    """What a progress file says; `details` are numbers, such as the loss."""

    what: str
    done: int
    total: int | None
    details: dict[str, float]


def read_progress(path: Path) -> Reported | None:
    """Return what a progress file says, or None if it does not exist or is damaged, which does no harm."""
    try:
        content = read_json(path)
    except ValueError:
        return None
    if not isinstance(content, dict):
        return None
    what, done, total = (content.pop(name, None) for name in ("what", "done", "total"))
    if not (isinstance(what, str) and isinstance(done, int) and isinstance(total, int | None)):
        return None
    return Reported(what, done, total, {name: value for name, value in content.items() if type(value) in (int, float)})


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
