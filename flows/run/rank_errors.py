"""The errors that ranks leave for their launcher."""

from pathlib import Path
from typing import Any

from data_scoring.base.files import read_json


class RanksFailedError(RuntimeError):
    """Ranks ended without finishing their job, through no fault of the user's that they could name."""


def first_error(folder: Path) -> dict[str, Any] | None:
    """Return the error of the rank that failed first, of those that ranks left in `folder`, or None."""
    errors = [read_json(path) for path in folder.glob("rank-*.json")]
    return min(errors, key=lambda error: error["time"]) if errors else None
