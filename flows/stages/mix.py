"""The stage `mix`: the samples that a round trains on, in training order."""

from pathlib import Path
from shlex import quote
from typing import Any

from data_scoring.base.files import fingerprint
from data_scoring.base.progress import Progress
from data_scoring.refine.refine_shards import mix_all, mix_selection
from flows.run.config import RunConfig
from flows.run.folder import Run
from flows.stages.contamination import contaminated_samples, samples_to_leave_out
from flows.stages.refine import draw_of
from flows.stages.stage import Stage, Stages


class Mix(Stage):
    """Mix everything in round 1, and the round's selection in later rounds."""

    name = "mix"

    def round_number(self, config: RunConfig, place: int) -> int | None:
        """Return every round."""
        return place or None

    def needs(self, config: RunConfig, round_number: int) -> list[tuple[str, int]]:
        """Return the round's selection, from round 2 on."""
        return [("refine", round_number)] if round_number > 1 else []

    def inputs(self, stages: Stages, round_number: int) -> list[Any]:
        """Return the selection or, in round 1, the corpus and the samples that are left out."""
        run = stages.run
        before = stages.fingerprint("refine", round_number) if round_number > 1 else _everything(stages)
        return [before, run.corpus().fingerprint, run.config.seed, round_number]

    def files(self, run: Run, round_number: int) -> list[Path]:
        """Return the mix."""
        return [run.round_folder(round_number) / "mix.parquet"]

    def waits_for(self, run: Run, round_number: int) -> str | None:
        """Return the command that approves the round's selection, if `rounds.approval` requires it."""
        return f"approval: reprise approve {quote(str(run.folder))}" if run.awaits_approval(round_number) else None

    def do(self, stages: Stages, round_number: int, progress: Progress) -> bool:
        """Mix. Raises ValueError if the selection has to be approved first."""
        run = stages.run
        if run.awaits_approval(round_number) and not self.is_complete(stages, round_number):
            folder = quote(str(run.folder))
            raise ValueError(
                f"rounds.approval: the selection of round {round_number} is not approved yet; review it with "
                f"`reprise refine {folder} --dry-run`, then run `reprise approve {folder}`"
            )
        return super().do(stages, round_number, progress)

    def work(self, stages: Stages, round_number: int, progress: Progress) -> None:
        """Write the mix."""
        run = stages.run
        path, samples = run.round_folder(round_number) / "mix.parquet", run.corpus().samples_path
        if round_number == 1:
            limits = run.config.refine, run.config.train.max_tokens, samples_to_leave_out(run)
            count = mix_all(path, samples, run.config.seed, *limits, _order(run.config))
        else:
            count = mix_selection(path, draw_of(run, round_number, run.refine_config(round_number)), samples)
        progress("mixing (samples)", count, count)


def _everything(stages: Stages) -> str:
    """Return the fingerprint of the samples of round 1."""
    config = stages.run.config
    before = stages.fingerprint("prepare", 0)
    late = sorted(rule.name for rule in config.refine.sources if rule.from_round > 1)
    if late or config.train.max_tokens is not None:
        before = fingerprint(before, late, *filter(None, [config.train.max_tokens]))
    if config.eval.removes:
        before = fingerprint(before, "without", contaminated_samples(stages.run))
    return fingerprint(before, "order", order) if (order := _order(config)) else before


def _order(config: RunConfig) -> list[str]:
    """Return the sources in whose order round 1 trains on them; none if it is random."""
    return [source.name for source in config.corpus.sources] if config.rounds.first_order == "sources" else []
