"""Scoring a round within its budget: in full, by a prefix, by what training saw, or by what a calibration shows."""

from dataclasses import asdict
from pathlib import Path

from data_scoring.base.files import checksum, fingerprint
from data_scoring.base.parquet import parquet_fingerprint
from data_scoring.base.progress import Progress
from data_scoring.config import RefineConfig, prefix_of
from data_scoring.corpus.corpus import Corpus
from data_scoring.losses.calibration import calibration_path
from data_scoring.losses.origin import Origin, check_origins
from data_scoring.losses.seen_losses import write_seen_losses
from data_scoring.losses.shard_scoring import losses_path
from data_scoring.refine.budget import (
    Candidate,
    calibration_cost,
    choose,
    measure_candidates,
    scoring_cost,
    write_budget,
)
from data_scoring.refine.candidates import uses_seen_loss
from flows.launch import launcher
from flows.launch.job_fields import device_kind, final_checkpoint, job_fields
from flows.run.folder import Run
from trainer.devices import resolve_precision
from trainer.jobs import CalibrateJob, ScoreJob


def score_round(run: Run, round_number: int, progress: Progress) -> None:
    """Give every sample its loss after a round by `score.budget`, and note in budget.parquet what that costs.

    What is there already of the same checkpoint, corpus, tokenizer, precision and budget is kept.
    """
    corpus, folder = run.corpus(), run.round_folder(round_number)
    budget, calibration_tokens = run.config.score.budget, None
    if budget == "auto":
        candidates = _calibrated(run, round_number, corpus, progress)
        budget = choose(candidates, run.config.score.min_correlation).name
        calibration_tokens = calibration_cost(folder)
    else:
        candidates = [Candidate(budget, scoring_cost(corpus, budget))]
    write_budget(folder, candidates, budget, calibration_tokens, run.fingerprint("score", round_number))
    origin = origin_of(run, round_number, corpus, budget)
    identity = _identity(run, round_number, "losses", origin)
    if budget == "seen":

        def on_shard(done: int) -> None:
            progress("taking seen losses (shards)", done, corpus.num_shards)

        write_seen_losses(corpus, folder, round_number, identity, origin, on_shard)
        return
    job = ScoreJob(
        **job_fields(run, round_number, identity),
        score=run.config.score,
        weights=final_checkpoint(run, round_number),
        origin=origin,
        prefix=prefix_of(budget),
    )
    launcher.launch(job, run.folder, f"score-{round_number}", progress, run.config.launch)


def _calibrated(run: Run, round_number: int, corpus: Corpus, progress: Progress) -> list[Candidate]:
    folder = run.round_folder(round_number)
    origin = origin_of(run, round_number, corpus, "full")
    identity = _identity(run, round_number, "calibration", origin)
    if parquet_fingerprint(calibration_path(folder)) != identity:
        job = CalibrateJob(
            **job_fields(run, round_number, identity),
            score=run.config.score,
            weights=final_checkpoint(run, round_number),
            origin=origin,
            round_number=round_number,
        )
        launcher.launch(job, run.folder, f"calibrate-{round_number}", progress, run.config.launch)
    return measure_candidates(corpus, folder, round_number, run.config.refine, run.config.seed)


def origin_of(run: Run, round_number: int, corpus: Corpus, budget: str) -> Origin:
    """Return what losses after a round depend on, scored by `budget` on the devices that the run has now."""
    return Origin(
        checkpoint=f"{run.fingerprint('train', round_number)}/{final_checkpoint(run, round_number).name}",
        tokenizer=checksum(corpus.tokenizer_path),
        corpus=corpus.fingerprint,
        precision=resolve_precision(run.config.train.precision, device_kind(run.config)),
        budget=budget,
    )


def _identity(run: Run, round_number: int, what: str, origin: Origin) -> str:
    """Return the fingerprint of scoring's results: those on another precision, say, are made again, not mixed in."""
    return fingerprint(what, run.fingerprint("score", round_number), asdict(origin))


def check_reference(refine: RefineConfig) -> None:
    """Raise ValueError where there are no losses of the reference model."""
    if not losses_path(Path(str(refine.reference)), 0).exists():
        raise ValueError(
            f"refine.reference: {refine.reference!r} holds no losses; name a round's folder that was scored, such as "
            "runs/large/rounds/1"
        )


def check_losses(run: Run, round_number: int, refine: RefineConfig) -> None:
    """Raise ValueError where the losses after a round are not of one origin, or not what `refine` can decide by.

    Those of a reference model have to be of the same corpus and scored alike; and losses that are compared with seen
    losses, which are of whole samples, have to be of whole samples too.
    """
    corpus, folder = run.corpus(), run.round_folder(round_number)
    origin = _origin(folder, corpus)
    if uses_seen_loss(refine) and origin.budget != "full":
        raise ValueError(
            f"refine.policy: {refine.policy} compares losses with seen losses, and round {round_number} was scored by "
            f"{origin.budget} (score.budget); take another policy, or score by full in a run of another name"
        )
    if refine.policy == "excess":
        check_reference(refine)
        reference = _origin(Path(str(refine.reference)), corpus)
        for field in ("tokenizer", "precision", "budget"):
            mine, theirs = getattr(origin, field), getattr(reference, field)
            if mine != theirs:
                raise ValueError(
                    f"refine.reference: {refine.reference!r} was scored with {field} {theirs!r} and this run with "
                    f"{mine!r}; score both alike"
                )


def _origin(round_folder: Path, corpus: Corpus) -> Origin:
    paths = (losses_path(round_folder, shard) for shard in range(corpus.num_shards))
    return check_origins(paths, corpus.fingerprint)
