"""The stage `train`: a round over its mix, starting from the final weights of the previous round."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_scoring.base.field_effects import deciding
from data_scoring.base.progress import Progress
from data_scoring.config import padded_vocab_size
from data_scoring.losses.seen_losses import list_seen_losses
from flows.evaluation.questions import Question, check_items
from flows.evaluation.rounds import RoundEvaluation, training_questions
from flows.launch import launcher
from flows.launch.job_fields import final_checkpoint, job_fields
from flows.run.config import RunConfig
from flows.run.folder import Run
from flows.stages.prepare import vocabulary_size
from flows.stages.stage import Stage, Stages
from trainer.checkpoint_folder import check_checkpoints, seconds_to_stop
from trainer.jobs import TrainJob
from trainer.records import validation_samples_path


class Train(Stage):
    """Train a round, with in-training evaluation if `eval.every_steps` is set."""

    name = "train"
    help = "train a round"

    def round_number(self, config: RunConfig, place: int) -> int | None:
        """Return every round."""
        return place or None

    def needs(self, config: RunConfig, round_number: int) -> list[tuple[str, int]]:
        """Return the round's mix, and the stage that gives its initial weights."""
        needed = [("mix", round_number)]
        if round_number > 1:
            needed.append(("train", round_number - 1))
        elif config.model.inherits:
            needed.append(("inherit", 1))
        return needed

    def inputs(self, stages: Stages, round_number: int) -> list[Any]:
        """Return the mix, and the configuration of model and training.

        The mix also represents the previous round, which this one starts from: its weights gave the losses.
        """
        config = stages.run.config
        # What a round takes over from the last; a round without a last one is the same whatever these fields are.
        taken_over = deciding(config.rounds, self.name) if round_number > 1 else {}
        return [
            stages.fingerprint("mix", round_number),
            *training_inputs(config),
            *([taken_over] if taken_over else []),
        ]

    def files(self, run: Run, round_number: int) -> list[Path]:
        """Return the logs; checkpoints have records of their own, and so have answers and scores."""
        folder = run.round_folder(round_number)
        logs = [folder / "steps.parquet", folder / "validation.parquet", *list_seen_losses(folder)]
        samples = validation_samples_path(folder)
        return [*logs, samples] if samples.exists() else logs

    def has_begun(self, run: Run, round_number: int) -> bool:
        """Return whether there is a checkpoint, or the record of one that was deleted."""
        return run.has_trained(round_number)

    def how_to_repeat(self, run: Run, round_number: int, record: Path) -> str:
        """Return that the round's folder has to be deleted: its logs were written during training."""
        return f"delete {run.round_folder(round_number)} to train the round again"

    def check(self, stages: Stages, round_number: int) -> None:
        """Raise ValueError if the round has a checkpoint of other training, or had one before it was cleaned."""
        run, identity = stages.run, stages.fingerprint(self.name, round_number)
        folder, record = run.round_folder(round_number) / "checkpoint", run.record_path(self.name, round_number)
        check_checkpoints(folder, identity)
        # Cleaning leaves the folder; a person who wants to train the round again has moved it away.
        if folder.exists() and run.recorded(self.name, round_number) not in (None, identity):
            raise ValueError(
                f"{record}: the round was trained with another configuration, corpus, mix or initial checkpoint; "
                f"restore these, or delete {record}, and the same command trains the round again"
            )

    def work(self, stages: Stages, round_number: int, progress: Progress) -> None:
        """Train on the run's ranks."""
        run = stages.run
        start_from = _start_of(run, round_number)
        if run.config.eval.asked:
            check_items(run.config.eval)
        questions = training_questions(run, progress)
        run.forget("evaluate", round_number)
        identity = stages.fingerprint(self.name, round_number)
        evaluation = RoundEvaluation(run, round_number, identity)
        evaluation.forget_others(questions)
        job = _train_job(run, round_number, start_from, identity, questions)
        progress = evaluation.scoring_in_training(questions, progress)
        stages.launch(job, f"train-{round_number}", progress)
        evaluation.score_training(questions)


def training_inputs(config: RunConfig) -> list[dict[str, Any]]:
    """Return the fields of the model's and training's configuration that decide a round's final weights."""
    return [deciding(section, "train") for section in (config.model, config.resolved_train)]


def launch_plan(config: RunConfig, command: Sequence[str]) -> str:
    """Return how the ranks of the first round would be launched: torchrun's command, Slurm's script, or a RayJob.

    command: that which does the whole run.
    """
    run = Run(config, config.folder.absolute())
    return launcher.plan(_train_job(run, 1, None, "?"), run.folder, "train-1", config.launch, command)


def _start_of(run: Run, round_number: int) -> Path | None:
    """Return the checkpoint that a round starts from, or None if it starts from random weights."""
    if round_number > 1:
        return final_checkpoint(run, round_number - 1)
    if run.config.model.inherits:
        from flows.inheritance.initial_checkpoint import inherited_checkpoint

        return inherited_checkpoint(run)
    if run.config.model.start_from is None:
        return None
    # Takes two seconds to import.
    from trainer.checkpoint_shapes import check_start

    start_from = Path(run.config.model.start_from).absolute()
    check_start(start_from, run.config.model, run.corpus().vocab_size)
    return start_from


def _train_job(
    run: Run, round_number: int, start_from: Path | None, identity: str, questions: Sequence[Question] = ()
) -> TrainJob:
    from trainer.devices import resolve_precision
    from trainer.memory import checkpoint_bytes

    config = run.config
    fields = job_fields(run, round_number, identity)
    # The configured tokenizer may be gone once the corpus, which has a copy, is prepared.
    vocab_size = config.model.vocab_size or (
        run.corpus().vocab_size if (run.corpus_folder / "manifest.json").exists() else vocabulary_size(config)
    )
    num_parameters = config.model.num_parameters(padded_vocab_size(vocab_size))
    num_bytes = checkpoint_bytes(num_parameters, resolve_precision(config.train.precision, fields["device"]))
    return TrainJob(
        **fields,
        seconds_to_stop=seconds_to_stop(num_bytes),
        train=config.train_of(round_number),
        checkpoint=config.checkpoint,
        score=config.score,
        start_from=start_from,
        keeps_optimizer=config.rounds.keep_optimizer and round_number > 1,
        evaluate=RoundEvaluation(run, round_number, identity).in_training(questions),
    )
