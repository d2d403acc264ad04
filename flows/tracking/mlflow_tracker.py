"""MLflow: a tracking server, or a database file."""

import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Read when mlflow is imported. A server that is away is asked again later.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from flows.run.trackers import TrackerConfig
from flows.tracking.tracker import Point, Tracker

# Limits of MLflow's interface.
_MOST_METRICS, _MOST_PARAMS, _LONGEST_PARAM = 1000, 100, 500
# A tag by which a run is found whose creation was not recorded here.
_TAG = "reprise.id"


class MlflowTracker(Tracker):
    """Logs to the tracking URI `uri`, or to a SQLite file in the run folder.

    Points that come twice are stored once: MLflow identifies a value by its name, step and time.
    """

    variable = "MLFLOW_TRACKING_URI"

    def __init__(self, settings: TrackerConfig, run_name: str, folder: Path, memory: dict[str, Any]) -> None:
        """Find or create the experiment and the run."""
        super().__init__(settings, run_name, folder, memory)
        uri, location = settings.uri, None
        if uri is None:
            folder.mkdir(parents=True, exist_ok=True)
            uri = f"sqlite:///{folder.absolute() / 'mlflow.db'}"
        if uri.startswith("sqlite:///"):
            # MLflow would write artifacts to the working directory.
            location = (Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts").as_uri()
        self._client = MlflowClient(tracking_uri=uri)
        memory.setdefault("id", uuid.uuid4().hex)
        experiment = self._client.get_experiment_by_name(settings.project)
        experiment_id = (
            self._client.create_experiment(settings.project, artifact_location=location)
            if experiment is None
            else experiment.experiment_id
        )
        found = self._client.search_runs([experiment_id], f"tags.`{_TAG}` = '{memory['id']}'", max_results=1)
        run = found[0] if found else self._client.create_run(
            experiment_id, tags={_TAG: memory["id"]}, run_name=run_name
        )  # fmt: skip
        self._id = run.info.run_id
        self._client.update_run(self._id, status="RUNNING")

    def configure(self, fields: dict[str, Any], text: str) -> None:
        """Log parameters, which cannot change later, and the configuration as an artifact, which can."""
        known = self._client.get_run(self._id).data.params
        fresh = [Param(name, str(value)[:_LONGEST_PARAM]) for name, value in fields.items() if name not in known]
        for start in range(0, len(fresh), _MOST_PARAMS):
            self._client.log_batch(self._id, params=fresh[start : start + _MOST_PARAMS])
        self._client.log_text(self._id, text, "run.yaml")

    def send(self, points: Sequence[Point]) -> None:
        """Log metrics."""
        metrics = [
            Metric(name, value, round(point.time * 1000), point.step)
            for point in points
            for name, value in point.values.items()
        ]
        for start in range(0, len(metrics), _MOST_METRICS):
            self._client.log_batch(self._id, metrics=metrics[start : start + _MOST_METRICS])

    def show_report(self, page: Path, pictures: Sequence[Path]) -> None:
        """Log the page, which holds its pictures, as an artifact."""
        self._client.log_artifact(self._id, str(page))

    def close(self, is_done: bool) -> None:
        """Set the run's status."""
        self._client.set_terminated(self._id, "FINISHED" if is_done else "KILLED")
