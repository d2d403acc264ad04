"""What trackers hold, read with their own packages where these can, as values by name and step."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Of each name, the (step, value) pairs in the order of steps.
Values = dict[str, list[tuple[int, float]]]


def read_tensorboard(folder: Path) -> Values:
    """Return the scalars in the event files of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()
    return {tag: sorted((each.step, each.value) for each in events.Scalars(tag)) for tag in events.Tags()["scalars"]}


def read_mlflow(uri: str, project: str = "reprise") -> Values:
    """Return the metrics of the only run in an experiment."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(project)
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    return {
        name: sorted((each.step, each.value) for each in client.get_metric_history(run.info.run_id, name))
        for name in run.data.metrics
    }


def read_trackio(folder: Path, run: str, project: str = "reprise") -> Values:
    """Return the values of a run, read by another process: Trackio has one folder in a process."""
    code = f"import json; from trackio import SQLiteStorage as s; print(json.dumps(s.get_logs({project!r}, {run!r})))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "TRACKIO_DIR": str(folder)}, capture_output=True, check=True
    )
    return _by_name(json.loads(done.stdout.splitlines()[-1]))


def read_wandb(folder: Path) -> Values:
    """Return the history in the files that wandb has written offline."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for content in _records(path.read_bytes()):
            record = Record.FromString(content)
            if record.WhichOneof("record_type") == "history":
                rows.append(
                    {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                )
    return _by_name(rows)


def _records(content: bytes) -> Iterator[bytes]:
    """Yield the records of a file in LevelDB's log format, after a header of 7 bytes."""
    place, block, parts = 7, 32_768, b""
    while place + 7 <= len(content):
        if block - place % block < 7:
            place += block - place % block
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        # 1: whole, 2: first, 3: middle, 4: last.
        if kind in (1, 4):
            yield parts
            parts = b""


def _by_name(rows: list[dict[str, Any]]) -> Values:
    found: Values = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step" and not name.startswith("_"):
                found.setdefault(name, []).append((row["step"], value))
    return {name: sorted(values) for name, values in found.items()}


READERS = {
    "tensorboard": lambda run: read_tensorboard(run / "tracking" / "tensorboard"),
    "mlflow": lambda run: read_mlflow(f"sqlite:///{run / 'tracking' / 'mlflow' / 'mlflow.db'}"),
    "wandb": lambda run: read_wandb(run / "tracking" / "wandb"),
    "trackio": lambda run: read_trackio(run / "tracking" / "trackio", run.name),
}
