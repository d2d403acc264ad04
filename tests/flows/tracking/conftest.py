"""What tests of trackers share: a run without corpus, whose rounds they write, and a whole one."""

import shutil
import sys
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from data_scoring.base.progress import silent
from flows.report.run_report import write_report
from flows.run.config import parse_config
from flows.run.folder import Run, open_run, read_run
from flows.run.trackers import TRACKER_KINDS, TrackerConfig
from flows.stages.stage_order import complete_all, steps_of
from flows.tracking.sender import Sender
from tests.conftest import MakeOnce
from tests.flows.fakes import fake_ranks, values, write_texts
from trainer.records import STEPS, VALIDATION, RowLog


class Rounds:
    """Writes the records of rounds as training does."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def open(self, number: int, fingerprint: str, up_to_step: int = 0) -> tuple[RowLog, RowLog]:
        """Return the records of steps and of validation, as of an attempt that resumes from a step."""
        folder = self.run.round_folder(number)
        folder.mkdir(parents=True, exist_ok=True)
        return (
            RowLog(folder / "steps.parquet", STEPS, fingerprint, up_to_step),
            RowLog(folder / "validation.parquet", VALIDATION, fingerprint, up_to_step),
        )


def step_row(step: int, loss: float) -> dict[str, Any]:
    """Return a row of steps.parquet."""
    return {
        "step": step, "loss": loss, "lr": 0.1 / step, "grad_norm": 1.5, "num_samples": 2, "num_tokens": 64,
        "tokens_per_second": 100.0 + step, "seconds": float(step),
        "ended_at": datetime(2026, 3, 4, 5, 6) + timedelta(seconds=step),
    }  # fmt: skip


@pytest.fixture
def rounds(tmp_path: Path) -> Rounds:
    """A run of two rounds that has begun, and nothing else."""
    return Rounds(open_run(parse_config(values(tmp_path, tmp_path), "test")))


@pytest.fixture(scope="session")
def whole_once(make_once: MakeOnce) -> Path:
    """The folder of a complete run of two rounds, whose ranks are fakes, in a folder called x."""

    def fill(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            fake_ranks(patch)
            run = open_run(parse_config(values(write_texts(folder), folder), "test"))
            complete_all(run, steps_of(run.config), silent)
        write_report(run)

    return make_once("tracked", fill) / "x"


@pytest.fixture
def whole(whole_once: Path, tmp_path: Path) -> Run:
    """A copy of it."""
    return read_run(Path(shutil.copytree(whole_once, tmp_path / "x")))


@pytest.fixture(params=TRACKER_KINDS)
def tracker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of each tracker whose package is installed."""
    name = str(request.param)
    pytest.importorskip(TRACKER_KINDS[name].package)
    for kind in ("TENSORBOARD_LOGDIR", "WANDB_BASE_URL", "MLFLOW_TRACKING_URI", "TRACKIO_DIR"):
        monkeypatch.delenv(kind, raising=False)
    # Trackio has one folder from its import on.
    for module in [each for each in sys.modules if each.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, module)
    return name


@pytest.fixture
def send() -> Callable[..., int]:
    """Sends a run to a tracker, as a new process would, and returns the number of points."""

    def call(run: Run, name: str, is_over: bool = True, **settings: Any) -> int:
        return Sender(run, TrackerConfig(name=name, **settings)).send(is_over)

    return call
