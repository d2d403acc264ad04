"""A stage of one's own, as a user would write it: how many words the samples of a mix hold, before a round trains."""

from pathlib import Path
from typing import Any

from data_scoring.base.files import write_json
from data_scoring.base.progress import Progress
from data_scoring.refine.training_mix import Mix
from flows.run.config import RunConfig
from flows.run.folder import Run
from flows.stages.stage import Stage, Stages


class CountTokens(Stage):
    """Count the tokens that a round trains on, into tokens.json of its folder."""

    name = "count"
    help = "count the tokens of a round's mix"

    def round_number(self, config: RunConfig, place: int) -> int | None:
        """Return every round."""
        return place or None

    def needs(self, config: RunConfig, round_number: int) -> list[tuple[str, int]]:
        """Return the round's mix."""
        return [("mix", round_number)]

    def inputs(self, stages: Stages, round_number: int) -> list[Any]:
        """Return the mix."""
        return [stages.fingerprint("mix", round_number)]

    def files(self, run: Run, round_number: int) -> list[Path]:
        """Return the count."""
        return [run.round_folder(round_number) / "tokens.json"]

    def work(self, stages: Stages, round_number: int, progress: Progress) -> None:
        """Count."""
        folder = stages.run.round_folder(round_number)
        mix = Mix(folder / "mix.parquet")
        num_tokens = int(stages.run.corpus().read(*mix.read(0, len(mix))).num_tokens.sum())
        write_json(folder / "tokens.json", {"num_tokens": num_tokens})
        progress("counting (samples)", len(mix), len(mix))
