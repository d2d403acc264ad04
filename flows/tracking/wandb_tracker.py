"""Weights & Biases: files for `wandb sync`, or a server."""

import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("WANDB_ERROR_REPORTING", "false")

import wandb

from flows.run.trackers import TrackerConfig
from flows.tracking.tracker import Point, Tracker


class WandbTracker(Tracker):
    """Logs to the server `uri`, or offline to the run folder."""

    variable = "WANDB_BASE_URL"

    def __init__(self, settings: TrackerConfig, run_name: str, folder: Path, memory: dict[str, Any]) -> None:
        """Start the run, or go on with it."""
        super().__init__(settings, run_name, folder, memory)
        folder.mkdir(parents=True, exist_ok=True)
        memory.setdefault("id", uuid.uuid4().hex)
        options: dict[str, Any] = {} if settings.uri is None else {"base_url": str(settings.uri)}
        self._run = wandb.init(
            project=settings.project,
            id=memory["id"],
            name=run_name,
            dir=folder,
            mode="online" if options else "offline",
            resume="allow",
            # Only what Reprise sends.
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, disable_code=True, save_code=False,
                x_disable_stats=True, x_disable_meta=True, **options,
            ),
        )  # fmt: skip
        # W&B's own step would have to rise with every call.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def configure(self, fields: dict[str, Any], text: str) -> None:
        """Set the run's configuration."""
        self._run.config.update(fields, allow_val_change=True)

    def send(self, points: Sequence[Point]) -> None:
        """Log points."""
        for point in points:
            self._run.log({**point.values, "step": point.step, "_timestamp": point.time})

    def show_report(self, page: Path, pictures: Sequence[Path]) -> None:
        """Log the page, which holds its pictures."""
        self._run.log({"report": wandb.Html(page.read_text(encoding="utf-8"), inject=False)})

    def close(self, is_done: bool) -> None:
        """Finish: everything is in the files, or at the server."""
        self._run.finish()
