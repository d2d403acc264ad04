"""The time that a piece of work takes over several attempts, of which some may have been killed."""

import json
import time
from pathlib import Path
from typing import Any

from data_scoring.base.files import read_json

_SECONDS_BETWEEN_NOTES = 1.0


class SpentTime:
    """Counts the seconds of a piece of work; a small file keeps those of an attempt that is killed.

    identity: of the work; a file of other work does not count. recorded: seconds that the work's own result holds.
    """

    def __init__(self, path: Path, identity: str, recorded: float = 0.0) -> None:
        self._path, self._identity = path, identity
        self._before = max(recorded, _read(path, identity))
        self._started = self._noted = time.monotonic()

    @property
    def seconds(self) -> float:
        """Return the seconds spent so far, in all attempts; a killed one counts up to its last note."""
        return self._before + time.monotonic() - self._started

    def note(self) -> None:
        """Write the seconds down, at most once a second."""
        if time.monotonic() - self._noted >= _SECONDS_BETWEEN_NOTES:
            self.note_now()

    def note_now(self) -> None:
        """Write the seconds down."""
        self._noted = time.monotonic()
        # Renamed but not fsynced: losing it in a crash only makes the figure too low.
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        temporary.write_text(json.dumps({"identity": self._identity, "seconds": self.seconds}))
        temporary.rename(self._path)

    def forget(self) -> None:
        """Delete the file, once the work's result holds the seconds."""
        self._path.unlink(missing_ok=True)


def _read(path: Path, identity: str) -> float:
    try:
        content = read_json(path)
    except ValueError:
        return 0.0
    if not isinstance(content, dict) or content.get("identity") != identity:
        return 0.0
    seconds: Any = content.get("seconds")
    is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    return float(seconds) if is_number and 0 <= seconds < 1e12 else 0.0
