"""The stage `refine`: the samples that a round trains on, selected by the losses of the previous round."""

from pathlib import Path
from typing import Any

from data_scoring.base.engine import Engine, LocalEngine
from data_scoring.base.field_effects import deciding
from data_scoring.base.parquet import is_intact, parquet_fingerprint
from data_scoring.base.progress import Progress, silent
from data_scoring.base.temporary_folders import temporary_folder
from data_scoring.corpus.corpus import Corpus
from data_scoring.losses.origin import Origin, check_origins
from data_scoring.losses.shard_scoring import losses_path
from data_scoring.refine.candidates import Draw
from data_scoring.refine.near_duplicates import write_near_duplicates
from data_scoring.refine.policies import REFERENCE_LOSS, SEEN_LOSS
from data_scoring.refine.refine_config import RefineConfig
from data_scoring.refine.refine_shards import refine, selection_path
from data_scoring.refine.selection_summary import SelectionSummary, dry_run, summarise_selection
from flows.run.config import RunConfig
from flows.run.folder import Run, recorded_files
from flows.stages.contamination import samples_to_leave_out
from flows.stages.stage import Stage, Stages


class Refine(Stage):
    """Select the samples of a round, shard by shard, and record why each is kept or not."""

    name = "refine"
    help = "select what a round trains on and make its mix"

    def round_number(self, config: RunConfig, place: int) -> int | None:
        """Return every round except the first."""
        return place if place > 1 else None

    def needs(self, config: RunConfig, round_number: int) -> list[tuple[str, int]]:
        """Return the scores of the previous round."""
        return [("score", round_number - 1)]

    def inputs(self, stages: Stages, round_number: int) -> list[Any]:
        """Return the losses (with the reference's, if the policy uses them), the refine configuration and the seed."""
        run = stages.run
        config = _resolved(run, round_number, run.refine_config(round_number))
        decided = deciding(config, self.name)
        if config.within == "part":
            decided["num_parts"] = run.config.rounds.num_parts
        inputs = [
            stages.fingerprint("score", round_number - 1),
            decided,
            run.config.seed,
            round_number,
        ]
        if REFERENCE_LOSS in config.columns:
            shards, reference = range(run.config.corpus.num_shards), Path(str(config.reference))
            inputs.append([parquet_fingerprint(losses_path(reference, shard)) for shard in shards])
        return inputs

    def files(self, run: Run, round_number: int) -> list[Path]:
        """Return the selection from each shard, and the list of near duplicates, if there is one."""
        folder, config = run.round_folder(round_number), run.refine_config(round_number)
        duplicates = [] if config.near_duplicates is None else [_duplicates_path(run.corpus_folder, config)]
        return [*(selection_path(folder, shard) for shard in range(run.corpus().num_shards)), *duplicates]

    def has_begun(self, run: Run, round_number: int) -> bool:
        """Return whether there is a selection; near duplicates may be another round's."""
        return any((run.round_folder(round_number) / "selection").glob("*.parquet"))

    def work(self, stages: Stages, round_number: int, progress: Progress) -> None:
        """Write the selection."""
        run, config = stages.run, stages.run.refine_config(round_number)
        check_losses(run, round_number - 1, config)
        identity = stages.fingerprint(self.name, round_number)
        with stages.open_engine() as engine:
            duplicates = _near_duplicates(run, config, engine, progress, run.corpus_folder)
            refine(draw_of(run, round_number, config, duplicates), identity, engine, progress)


def preview(run: Run, round_number: int, config: RefineConfig | None = None) -> SelectionSummary:
    """Return what refining for `round_number` with `config` (default: the run's own) would keep; writes nothing.

    The previous round has to be scored.
    """
    config = config or run.refine_config(round_number)
    check_losses(run, round_number - 1, config)
    with temporary_folder() as folder:
        duplicates = _near_duplicates(run, config, LocalEngine(1), silent, folder)
        return dry_run(draw_of(run, round_number, config, duplicates), run.corpus().samples_path)


def selection_of(run: Run, round_number: int) -> SelectionSummary:
    """Return the summary of a refined round's selection."""
    return summarise_selection(draw_of(run, round_number, run.refine_config(round_number)), run.corpus().samples_path)


def draw_of(run: Run, round_number: int, config: RefineConfig, duplicates: Path | None = None) -> Draw:
    """Return the inputs of a round's draw; `duplicates` is the file that lists near duplicates."""
    corpus = run.corpus()
    return Draw(
        rounds=run.folder / "rounds",
        round_number=round_number,
        config=_resolved(run, round_number, config),
        seed=run.config.seed,
        num_samples=[corpus.num_samples(shard) for shard in range(corpus.num_shards)],
        duplicates=duplicates,
        contaminated=samples_to_leave_out(run),
        num_parts=run.config_at(round_number).rounds.num_parts,
    )


def _resolved(run: Run, round_number: int, config: RefineConfig) -> RefineConfig:
    return config.resolve(run.config_at(round_number).resolved_train.global_batch_size)


def _near_duplicates(run: Run, config: RefineConfig, engine: Engine, progress: Progress, folder: Path) -> Path | None:
    """Return the file of near duplicates, written to `folder` unless the run has it, or None if none is needed."""
    if config.near_duplicates is None:
        return None
    corpus = run.corpus()
    has_it = is_intact(_duplicates_path(run.corpus_folder, config), corpus.fingerprint)
    path = _duplicates_path(run.corpus_folder if has_it else folder, config)
    write_near_duplicates(corpus, config.near_duplicates, path, config.memory_gb, engine, progress)
    return path


def _duplicates_path(folder: Path, config: RefineConfig) -> Path:
    return folder / f"near-duplicates-{config.near_duplicates:g}.parquet"


def check_reference(refine: RefineConfig) -> None:
    """Raise ValueError if there are no losses of the reference model."""
    if not losses_path(Path(str(refine.reference)), 0).exists():
        raise ValueError(
            f"refine.reference: {refine.reference!r} has no losses; give the folder of a scored round: "
            "rounds/1 in a run's folder"
        )


def check_losses(run: Run, round_number: int, refine: RefineConfig) -> None:
    """Raise ValueError if the losses after a round have different origins, or `refine` cannot use them.

    A reference model's losses must be of the same corpus and scored in the same way. Losses that are compared with seen
    losses must be of whole samples, as those are.
    """
    corpus, folder = run.corpus(), run.round_folder(round_number)
    origin = _origin(folder, corpus)
    if SEEN_LOSS in refine.columns and origin.budget != "full":
        raise ValueError(
            f"refine.policy: {refine.policy} compares losses with seen losses, but round {round_number} was scored "
            f"with score.budget {origin.budget}; set another policy, or score with full in a run with another name"
        )
    if REFERENCE_LOSS in refine.columns:
        check_reference(refine)
        _verify_reference(run, Path(str(refine.reference)))
        reference = _origin(Path(str(refine.reference)), corpus)
        for field in ("tokenizer", "precision", "budget"):
            mine, theirs = getattr(origin, field), getattr(reference, field)
            if mine != theirs:
                raise ValueError(
                    f"refine.reference: {refine.reference!r} was scored with {field} {theirs!r} and this run with "
                    f"{mine!r}; score both in the same way"
                )


def _verify_reference(run: Run, round_folder: Path) -> None:
    """Raise ValueError if the losses of a reference model are not as its scoring wrote them."""
    files = {
        round_folder / "losses" / Path(name).name: written
        for name, written in recorded_files(round_folder / "score.json").items()
        if Path(name).parent.name == "losses"
    }
    for path, reason in run.verifier().find_damage(files).items():
        raise ValueError(
            f"refine.reference: {path}: damaged since it was written: {reason}; restore it, or score again there"
        )


def _origin(round_folder: Path, corpus: Corpus) -> Origin:
    paths = (losses_path(round_folder, shard) for shard in range(corpus.num_shards))
    return check_origins(paths, corpus.fingerprint)
