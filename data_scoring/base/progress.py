"""How a long piece of work says how far it is, without knowing who listens."""

import json
import time
from collections.abc import Callable
from pathlib import Path

# Called with (what is being done, units done, units in all or None where unknown).
Progress = Callable[[str, int, int | None], None]


def silent(what: str, done: int, total: int | None) -> None:
    """Ignore progress."""


class ProgressFile:
    """A progress that others follow by reading a small JSON file, rewritten at most twice a second."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last = 0.0
        self.details: dict[str, float] = {}

    def __call__(self, what: str, done: int, total: int | None) -> None:
        """Note that `done` of `total` units are done; the last unit is always written."""
        now = time.monotonic()
        if done != total and now - self._last < 0.5:
            return
        self._last = now
        # Renamed but not fsynced: a reader never sees half of it, and a crash may well lose it.
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        temporary.write_text(json.dumps({"what": what, "done": done, "total": total, **self.details}))
        temporary.rename(self._path)
