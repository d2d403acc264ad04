"""The stages of a run: plain functions over a run folder. Each returns whether there was anything left to do."""

import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data_scoring.base.parquet import parquet_fingerprint
from data_scoring.base.progress import Progress, silent
from data_scoring.config import EvalConfig, RefineConfig, padded_vocab_size
from data_scoring.contamination.contaminated_samples import contamination_path, write_contamination
from data_scoring.corpus.prepare_corpus import prepare_corpus
from data_scoring.corpus.reading_order import ReadingOrder
from data_scoring.evaluation.items import ItemText
from data_scoring.evaluation.tasks import resolve_names
from data_scoring.ledger import refresh_ledger
from data_scoring.refine.candidates import Draw
from data_scoring.refine.dry_run import DryRun, dry_run
from data_scoring.refine.near_duplicates import write_near_duplicates
from data_scoring.refine.refine_shards import mix_all, mix_selection
from data_scoring.refine.refine_shards import refine as refine_shards
from data_scoring.tokenizer.tokenizer import open_tokenizer
from flows.evaluation.questions import Question, check_items, item_texts
from flows.evaluation.rounds import (
    ask_round,
    forget_answers,
    repeated_evaluation,
    score_answers,
    score_training,
    scoring_in_training,
    training_questions,
)
from flows.inheritance.initial_checkpoint import inherited_checkpoint, is_current, make_start
from flows.inheritance.teacher import check_inheritance
from flows.launch import launcher
from flows.launch.job_fields import device_kind, final_checkpoint, job_fields
from flows.launch.slurm import check_tools
from flows.report.run_report import write_report
from flows.run.config import RunConfig
from flows.run.folder import Run
from flows.stages.score import check_losses, check_reference, score_round
from trainer.checkpoint_folder import list_checkpoints, seconds_to_stop
from trainer.checkpoint_shapes import check_start
from trainer.devices import check_count, check_kernel, check_layers, resolve, resolve_precision
from trainer.jobs import TrainJob
from trainer.memory import checkpoint_bytes


def prepare(run: Run, progress: Progress) -> bool:
    """Make the corpus: tokenise, hold out the validation set, cut shards."""
    config = run.config
    # What is not there is best known before hours of tokenising.
    if config.launch.kind == "slurm":
        check_tools()
    else:
        check_count(resolve(config.device), config.parallel.world_size // config.launch.nodes)
    check_layers(config.model.layers)
    check_kernels(config)
    check_vocabulary(config)
    if config.refine.policy == "excess":
        check_reference(config.refine)
    if run.is_complete("prepare"):
        return False
    check_inheritance(config)
    if config.eval.asked:
        check_items(config.eval)
    if config.model.start_from is not None:
        # A tokenizer that is yet to be trained has as many entries as its text lets it have.
        vocab_size = None if config.tokenizer.path is None else _tokenizer_size(config)
        check_start(Path(config.model.start_from), config.model, vocab_size)
    prepare_corpus(
        config.corpus,
        config.tokenizer,
        config.seed,
        run.corpus_folder,
        run.fingerprint("prepare"),
        progress,
    )
    refresh_ledger(run.folder)
    return True


def check_kernels(config: RunConfig) -> None:
    """Raise ValueError where training or scoring asks for a kernel that is not installed or not for the device."""
    for field, kernel, other in (
        ("train.loss_kernel", config.train.loss_kernel, "chunked"),
        ("train.activation_kernel", config.train.activation_kernel, "reference"),
        ("score.loss_kernel", config.score.loss_kernel, "chunked"),
    ):
        if kernel == "triton":
            check_kernel(field, kernel, device_kind(config), other)


def check_vocabulary(config: RunConfig) -> None:
    """Raise ValueError where the tokenizer cannot be opened, or has more entries than the model's vocabulary."""
    if config.model.vocab_size is None:
        return
    vocab_size = _tokenizer_size(config)
    if config.model.vocab_size < vocab_size:
        raise ValueError(
            f"model.vocab_size: {config.model.vocab_size} is smaller than the tokenizer's vocabulary of {vocab_size}; "
            "raise it, or leave it out"
        )


def vocabulary_size(config: RunConfig) -> int:
    """Return the entries of the model's vocabulary, as far as can be told before there is a corpus.

    A tokenizer that is yet to be trained may come out smaller.
    """
    return config.model.vocab_size or _tokenizer_size(config)


def _tokenizer_size(config: RunConfig) -> int:
    if config.tokenizer.path is None:
        return config.tokenizer.vocab_size
    return open_tokenizer(Path(config.tokenizer.path), config.tokenizer.end_of_document).vocab_size


def inherit(run: Run, progress: Progress) -> bool:
    """Make what round 1 starts from of a larger model, where `model.inherit` names one."""
    if not run.config.model.inherits:
        return False
    has_begun = bool(list_checkpoints(run.round_folder(1) / "checkpoint"))
    if run.is_complete("inherit", 1) and (has_begun or is_current(run)):
        return False
    with _completing(run, "inherit", 1):
        make_start(run, progress)
    return True


def contamination(run: Run, progress: Progress) -> bool:
    """List which training samples hold parts of the run's evaluation items, where `eval.contamination` asks for it."""
    return check_contamination(run, item_texts(run), progress)


def check_contamination(run: Run, items: Iterable[ItemText], progress: Progress) -> bool:
    """List which training samples hold parts of evaluation items, where `eval.contamination` asks for it.

    It comes after preparing and before the first mix. With eval.contamination: remove, `items` decide what is trained
    on: a run goes on with the same ones, or with others that overlap with the same samples.
    """
    config = run.config
    if config.eval.contamination == "off":
        return False
    corpus = run.corpus()
    order = ReadingOrder(corpus, config.seed)
    tokenizer = open_tokenizer(corpus.tokenizer_path, config.tokenizer.end_of_document)
    if not write_contamination(order, tokenizer, items, config.eval.contamination_ngram, progress):
        return False
    refresh_ledger(run.folder)
    return True


def _contaminated(run: Run) -> Path | None:
    """Return the file that lists the samples to leave out, or None where none are. Raises ValueError without it."""
    if not run.config.eval.removes:
        return None
    if run.contaminated_samples() is None:
        raise ValueError(
            f"{run.folder}: eval.contamination: remove needs the list of what overlaps with evaluation items, which is "
            f"not there; run `reprise run {run.folder}`, which does all that is missing"
        )
    return contamination_path(run.corpus_folder)


def mix(run: Run, round_number: int, progress: Progress) -> bool:
    """Make the mix that a round trains on: everything in round 1, else what the round's selection keeps."""
    if run.is_complete("mix", round_number):
        return False
    folder = run.round_folder(round_number)
    if run.awaits_approval(round_number):
        raise ValueError(
            f"rounds.approval: what round {round_number} trains on waits to be approved; look at it with "
            f"`reprise refine {run.folder} --dry-run`, then `reprise approve {run.folder}`"
        )
    with _completing(run, "mix", round_number):
        if round_number == 1:
            config, samples = run.config, run.corpus().samples_path
            limits = config.refine, config.train.max_tokens, _contaminated(run)
            count = mix_all(folder / "mix.parquet", samples, config.seed, *limits)
        else:
            _require(run, "refine", round_number)
            draw = _draw(run, round_number, run.refine_config(round_number))
            count = mix_selection(folder / "mix.parquet", draw, run.corpus().samples_path)
        progress("mixing (samples)", count, count)
    return True


def train(run: Run, round_number: int, progress: Progress) -> bool:
    """Train a round over its mix, from the weights that the round before ended with."""
    if run.is_complete("train", round_number):
        return False
    _require(run, "mix", round_number)
    start_from = None
    if round_number == 1 and run.config.model.inherits:
        _require(run, "inherit", 1)
        start_from = inherited_checkpoint(run)
    elif round_number == 1 and run.config.model.start_from is not None:
        start_from = Path(run.config.model.start_from).absolute()
        check_start(start_from, run.config.model, run.corpus().vocab_size)
    if round_number > 1:
        _require(run, "train", round_number - 1)
        start_from = final_checkpoint(run, round_number - 1)
    if run.config.eval.asked:
        check_items(run.config.eval)
    questions = training_questions(run, progress)
    run.forget("evaluate", round_number)
    forget_answers(run, round_number, questions)
    job = _train_job(run, round_number, start_from, run.fingerprint("train", round_number), questions)
    with _completing(run, "train", round_number):
        progress = scoring_in_training(run, round_number, questions, progress)
        launcher.launch(job, run.folder, f"train-{round_number}", progress, run.config.launch)
        score_training(run, round_number, questions)
    return True


def _train_job(
    run: Run, round_number: int, start_from: Path | None, fingerprint: str, questions: Sequence[Question] = ()
) -> TrainJob:
    config = run.config
    fields = job_fields(run, round_number, fingerprint)
    # A tokenizer that the corpus was prepared with need not be there any more.
    vocab_size = config.model.vocab_size or (
        run.corpus().vocab_size if (run.corpus_folder / "manifest.json").exists() else vocabulary_size(config)
    )
    num_parameters = config.model.num_parameters(padded_vocab_size(vocab_size))
    num_bytes = checkpoint_bytes(num_parameters, resolve_precision(config.train.precision, fields["device"]))
    return TrainJob(
        **fields,
        seconds_to_stop=seconds_to_stop(num_bytes),
        train=config.resolved_train,
        checkpoint=config.checkpoint,
        score=config.score,
        start_from=start_from,
        evaluate=repeated_evaluation(run, round_number, questions),
    )


def evaluate(run: Run, round_number: int, progress: Progress) -> bool:
    """Score the model that a round ended with in the tasks of `eval.tasks`."""
    config = run.config.eval
    if not config.asked or run.is_complete("evaluate", round_number):
        return False
    _require(run, "train", round_number)
    with _completing(run, "evaluate", round_number):
        questions = ask_round(run, round_number, config, progress)
        score_answers(run, round_number, questions, progress)
    return True


def evaluate_otherwise(run: Run, round_number: int, config: EvalConfig, progress: Progress) -> list[str]:
    """Score the model that a round ended with as `config` says, not the run's own configuration.

    Returns the tasks of the run's own that were so scored on other items: its stage makes their scores anew.
    """
    _require(run, "train", round_number)
    questions, own = ask_round(run, round_number, config, progress), run.config.eval
    replaced: list[str] = []
    if (config.data, config.limit) != (own.data, own.limit):
        asked = resolve_names(own.asked)
        replaced = [question.task.name for question in questions if question.task.name in asked]
    if replaced:
        run.forget("evaluate", round_number)
    score_answers(run, round_number, questions, progress)
    return replaced


def score(run: Run, round_number: int, progress: Progress) -> bool:
    """Give every sample of every shard its loss after a round, as `score.budget` says."""
    if run.is_complete("score", round_number):
        return False
    _require(run, "train", round_number)
    with _completing(run, "score", round_number):
        score_round(run, round_number, progress)
    return True


def refine(run: Run, round_number: int, progress: Progress) -> bool:
    """Select what `round_number` trains on by the losses of the round before."""
    if run.is_complete("refine", round_number):
        return False
    _require(run, "score", round_number - 1)
    config = run.refine_config(round_number)
    check_losses(run, round_number - 1, config)
    with _completing(run, "refine", round_number):
        path = _near_duplicates(run, config, progress, run.corpus_folder)
        refine_shards(_draw(run, round_number, config, path), run.fingerprint("refine", round_number), progress)
    return True


def preview(run: Run, round_number: int, config: RefineConfig | None = None) -> DryRun:
    """Return what refining for `round_number` with `config`, by default the run's own, would keep, writing nothing."""
    _require(run, "score", round_number - 1)
    config = config or run.refine_config(round_number)
    check_losses(run, round_number - 1, config)
    with tempfile.TemporaryDirectory() as folder:
        path = _near_duplicates(run, config, silent, Path(folder))
        return dry_run(_draw(run, round_number, config, path), run.corpus().samples_path)


def _near_duplicates(run: Run, config: RefineConfig, progress: Progress, folder: Path) -> Path | None:
    """Return the file that lists near duplicates, made in `folder` unless the run has it, or None if none is needed."""
    if config.near_duplicates is None:
        return None
    name = f"near-duplicates-{config.near_duplicates:g}.parquet"
    corpus = run.corpus()
    has_it = parquet_fingerprint(run.corpus_folder / name) == corpus.fingerprint
    path = (run.corpus_folder if has_it else folder) / name
    write_near_duplicates(corpus, config.near_duplicates, path, config.memory_gb, progress)
    return path


def _draw(run: Run, round_number: int, config: RefineConfig, duplicates: Path | None = None) -> Draw:
    corpus = run.corpus()
    return Draw(
        rounds=run.folder / "rounds",
        round_number=round_number,
        config=config,
        seed=run.config.seed,
        num_samples=[corpus.num_samples(shard) for shard in range(corpus.num_shards)],
        duplicates=duplicates,
        contaminated=_contaminated(run),
    )


def report(run: Run) -> Path:
    """Write the report over what the run folder holds and return its path."""
    refresh_ledger(run.folder)
    return write_report(run)


def launch_plan(config: RunConfig) -> str:
    """Return how the ranks of the first round would be launched: torchrun's command, or Slurm's script."""
    run = Run(config, config.folder.absolute())
    return launcher.plan(_train_job(run, 1, None, "?"), run.folder, "train-1", config.launch)


@contextmanager
def _completing(run: Run, stage: str, round_number: int) -> Iterator[None]:
    """Write the stage's completion record, and the views over what it left, once the work inside is done."""
    started = time.time()
    yield
    run.record(stage, round_number, started)
    refresh_ledger(run.folder)


def _require(run: Run, stage: str, round_number: int) -> None:
    if not run.is_complete(stage, round_number):
        raise ValueError(
            f"{run.folder}: {stage} of round {round_number} is not complete; "
            f"run `reprise run {run.folder}`, which does all that is missing"
        )
