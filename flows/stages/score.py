"""The stage `score`: the loss of every sample under the model of a round, within `score.budget`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_scoring.base.field_effects import deciding
from data_scoring.base.files import checksum, fingerprint
from data_scoring.base.parquet import is_intact
from data_scoring.base.progress import Progress
from data_scoring.base.spent_time import SpentTime
from data_scoring.config import prefix_of
from data_scoring.losses.calibration import calibration_path
from data_scoring.losses.origin import Origin
from data_scoring.losses.seen_losses import write_seen_losses
from data_scoring.losses.shard_scoring import losses_path
from data_scoring.refine.budget import (
    Candidate,
    budget_path,
    calibration_cost,
    choose,
    measure_candidates,
    recorded_seconds,
    scoring_cost,
    write_budget,
)
from flows.launch.job_fields import device_kind, final_checkpoint, job_fields
from flows.run.config import RunConfig
from flows.run.folder import Run
from flows.stages.stage import Stage, Stages
from trainer.jobs import CalibrateJob, ScoreJob


class Score(Stage):
    """Compute the loss of every sample of every shard under a round's model, within `score.budget`."""

    name = "score"
    help = "compute every sample's loss under the model of a round"

    def round_number(self, config: RunConfig, place: int) -> int | None:
        """Return the previous round: the round at `place` is selected by the losses of its model."""
        return place - 1 if place > 1 else None

    def needs(self, config: RunConfig, round_number: int) -> list[tuple[str, int]]:
        """Return the round's training."""
        return [("train", round_number)]

    def inputs(self, stages: Stages, round_number: int) -> list[Any]:
        """Return the model and the budget."""
        return [stages.fingerprint("train", round_number), deciding(stages.run.config.score, self.name)]

    def files(self, run: Run, round_number: int) -> list[Path]:
        """Return the losses of each shard, the budget and, if it was measured, the calibration."""
        folder = run.round_folder(round_number)
        losses = [losses_path(folder, shard) for shard in range(run.corpus().num_shards)]
        calibration = [calibration_path(folder)] if run.config.score.budget == "auto" else []
        return [*losses, *calibration, budget_path(folder)]

    def has_begun(self, run: Run, round_number: int) -> bool:
        """Return whether any sample has been scored."""
        folder = run.round_folder(round_number)
        return calibration_path(folder).exists() or any((folder / "losses").rglob("*.parquet"))

    def can_follow_training(self, config: RunConfig) -> bool:
        """Return whether scoring needs the model; seen losses do not."""
        return config.score.budget != "seen"

    def work(self, stages: Stages, round_number: int, progress: Progress) -> None:
        """Score on the run's ranks, and record the cost in budget.parquet.

        Existing losses with the same checkpoint, corpus, tokenizer, precision and budget are kept.
        """
        run = stages.run
        scoring = _Scoring(
            stages,
            round_number,
            stages.fingerprint("train", round_number),
            stages.fingerprint(self.name, round_number),
        )
        time = SpentTime(
            scoring.folder / "scoring-time.json", scoring.identity, recorded_seconds(scoring.folder, scoring.identity)
        )

        def timed(what: str, done: int, total: int | None) -> None:
            time.note()
            progress(what, done, total)

        budget, calibration_tokens = run.config.score.budget, None
        if budget == "auto":
            candidates = scoring.calibrate(timed)
            budget = choose(candidates, run.config.score.min_correlation).name
            calibration_tokens = calibration_cost(scoring.folder)
        else:
            candidates = [Candidate(budget, scoring_cost(run.corpus(), budget))]
        scoring.score(budget, timed)
        write_budget(scoring.folder, candidates, budget, calibration_tokens, time.seconds, scoring.identity)
        time.forget()


@dataclass(frozen=True)
class _Scoring:
    """Scoring a round: `trained` is the fingerprint of its training, `identity` that of this stage."""

    stages: Stages
    round_number: int
    trained: str
    identity: str

    @property
    def run(self) -> Run:
        """Return the run."""
        return self.stages.run

    @property
    def folder(self) -> Path:
        """Return the round's folder."""
        return self.run.round_folder(self.round_number)

    def calibrate(self, progress: Progress) -> list[Candidate]:
        """Return the cost and the accuracy of each budget, measured on a few samples."""
        run, corpus = self.run, self.run.corpus()
        origin = origin_of(run, self.round_number, self.trained, "full")
        identity = self._identity("calibration", origin)
        if not is_intact(calibration_path(self.folder), identity):
            job = CalibrateJob(
                **job_fields(run, self.round_number, identity),
                score=run.config.score,
                weights=final_checkpoint(run, self.round_number),
                origin=origin,
                round_number=self.round_number,
            )
            self.stages.launch(job, f"calibrate-{self.round_number}", progress)
        return measure_candidates(corpus, self.folder, self.round_number, run.config.refine, run.config.seed)

    def score(self, budget: str, progress: Progress) -> None:
        """Write the losses of all samples by `budget`: full, seen or prefix:P."""
        run, corpus = self.run, self.run.corpus()
        origin = origin_of(run, self.round_number, self.trained, budget)
        identity = self._identity("losses", origin)
        if budget == "seen":
            if self.stages.kept is not None:
                self.stages.kept.close()

            def on_shard(done: int) -> None:
                progress("taking seen losses (shards)", done, corpus.num_shards)

            write_seen_losses(corpus, self.folder, self.round_number, identity, origin, on_shard)
            return
        job = ScoreJob(
            **job_fields(run, self.round_number, identity),
            score=run.config.score,
            weights=final_checkpoint(run, self.round_number),
            origin=origin,
            prefix=prefix_of(budget),
        )
        self.stages.launch(job, f"score-{self.round_number}", progress)

    def _identity(self, what: str, origin: Origin) -> str:
        """Return the fingerprint of results, so that losses of another origin, such as precision, are not reused."""
        return fingerprint(what, self.identity, asdict(origin))


def origin_of(run: Run, round_number: int, trained: str, budget: str) -> Origin:
    """Return the origin of losses after a round, scored with `budget` on the run's current devices.

    trained: the fingerprint of the round's training.
    """
    from trainer.devices import resolve_precision

    corpus = run.corpus()
    return Origin(
        checkpoint=f"{trained}/{final_checkpoint(run, round_number).name}",
        tokenizer=checksum(corpus.tokenizer_path),
        corpus=corpus.fingerprint,
        precision=resolve_precision(run.config.train.precision, device_kind(run.config)),
        budget=budget,
    )
