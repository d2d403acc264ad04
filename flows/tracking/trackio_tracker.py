"""Trackio: a SQLite file that `trackio show` opens."""

import os
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flows.run.trackers import TrackerConfig
from flows.tracking.tracker import Point, Tracker


class TrackioTracker(Tracker):
    """Logs to the folder `uri`, or to the run folder; never to a server.

    It writes to Trackio's storage, without the thread of `trackio.log`, so that what is sent is on disk.
    """

    variable = "TRACKIO_DIR"

    def __init__(self, settings: TrackerConfig, run_name: str, folder: Path, memory: dict[str, Any]) -> None:
        """Choose the folder, which Trackio reads when it is imported."""
        super().__init__(settings, run_name, folder, memory)
        self._storage = _storage(settings.uri or str(folder.absolute()))
        memory.setdefault("id", uuid.uuid4().hex)
        memory.setdefault("config", {})

    def configure(self, fields: dict[str, Any], text: str) -> None:
        """Remember the configuration, which Trackio stores with values."""
        self.memory["config"] = fields

    def send(self, points: Sequence[Point]) -> None:
        """Store points; one that comes twice, by its key, is stored once."""
        self._storage.bulk_log(
            project=self.settings.project,
            run=self.run_name,
            run_id=self.memory["id"],
            metrics_list=[point.values for point in points],
            steps=[point.step for point in points],
            timestamps=[datetime.fromtimestamp(point.time, UTC).isoformat() for point in points],
            config=self.memory["config"],
            log_ids=[f"{self.memory['id']}-{point.key}" for point in points],
        )


def _storage(folder: str) -> Any:
    """Return Trackio's storage in `folder`, which it reads from the environment when it is imported."""
    before = os.environ.get("TRACKIO_DIR")
    os.environ["TRACKIO_DIR"] = folder
    try:
        from trackio import SQLiteStorage
    finally:
        if before is None:
            del os.environ["TRACKIO_DIR"]
        else:
            os.environ["TRACKIO_DIR"] = before
    return SQLiteStorage
