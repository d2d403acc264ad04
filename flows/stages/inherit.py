"""The stage `inherit`: round 1's initial checkpoint, pruned from a larger model."""

from pathlib import Path
from typing import Any

from data_scoring.base.field_effects import deciding
from data_scoring.base.progress import Progress
from flows.run.config import RunConfig
from flows.run.folder import Run
from flows.stages.stage import Stage, Stages


class Inherit(Stage):
    """Measure the larger model, choose its layers and neurons, and write the checkpoint that round 1 starts from."""

    name = "inherit"

    def round_number(self, config: RunConfig, place: int) -> int | None:
        """Return 1 before round 1, if `model.inherit` names a larger model."""
        return 1 if place == 1 and config.model.inherits else None

    def inputs(self, stages: Stages, round_number: int) -> list[Any]:
        """Return the corpus to measure on, the model, and the seed."""
        config = stages.run.config
        model = deciding(config.model, self.name, keep_neutral=True)
        return [stages.run.corpus().fingerprint, model, config.seed]

    def files(self, run: Run, round_number: int) -> list[Path]:
        """Return the lineage and the measurements; the checkpoint has a record of its own."""
        from flows.inheritance.initial_checkpoint import inheritance_folder

        return sorted(path for path in inheritance_folder(run).iterdir() if path.is_file())

    def do(self, stages: Stages, round_number: int, progress: Progress) -> bool:
        """Write the checkpoint; write it again if the larger model has changed and training has not begun."""
        from flows.inheritance.initial_checkpoint import is_current

        if not stages.run.has_trained(1) and self.is_complete(stages, round_number) and not is_current(stages.run):
            stages.run.forget(self.name, round_number)
        return super().do(stages, round_number, progress)

    def work(self, stages: Stages, round_number: int, progress: Progress) -> None:
        """Write the checkpoint."""
        from flows.inheritance.initial_checkpoint import make_start

        make_start(stages.run, stages.fingerprint(self.name, round_number), progress)
