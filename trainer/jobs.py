"""The jobs of a run's stages (train, score, calibrate, evaluate), and measurements on a trained model."""

from pathlib import Path
from typing import TYPE_CHECKING, Self

from pydantic import Field

from data_scoring.base.files import fingerprint, write_record
from data_scoring.config import Config, LossKernel, ScoreConfig
from data_scoring.losses.calibration import calibrate, candidate_prefixes, draw_from
from data_scoring.losses.origin import Origin
from data_scoring.losses.shard_scoring import LossFiles, score_shards
from data_scoring.tokenizer.tokenizer import open_tokenizer
from trainer.checkpoint_folder import list_checkpoints
from trainer.config import CheckpointConfig, ModelConfig, TrainConfig
from trainer.job import Job, RankContext, TrainedModelJob
from trainer.parallel_config import ParallelConfig

if TYPE_CHECKING:
    from trainer.model import Kernels


class Evaluation(Config):
    """The requests of an evaluation, one file per task (`trainer.requests`)."""

    requests: Path = Field(description="Folder of the requests, <task>.parquet.")
    tasks: tuple[str, ...] = Field(min_length=1, description="Tasks, in the order in which they are answered.")
    end_of_document: str | None = Field(
        default=None, description="Token that ends documents, if the tokenizer does not define one."
    )


class RepeatedEvaluation(Evaluation):
    """An in-training evaluation, repeated every `every_steps` steps."""

    answers: Path = Field(description="Folder of the answers, step-<number>/<task>.parquet.")
    every_steps: int = Field(ge=1, description="Steps from one evaluation to the next.")


class ModelInTrainingJob(Job):
    """A job that trains a model by its configuration, and computes losses with it."""

    train: TrainConfig
    score: ScoreConfig

    def resolved(self) -> Self:
        """Return the job with the kernels that `auto` selects on its device."""
        from trainer.devices import resolve_kernels

        train, score = resolve_kernels(self.train, self.score, self.device)
        return super().resolved().model_copy(update={"train": train, "score": score})

    def kernels(self) -> "Kernels":
        """Return the kernels of training and of scoring."""
        from trainer.model import Kernels

        return Kernels.resolve(
            self.device,
            self.train.loss_kernel,
            self.score.loss_kernel,
            self.activation_kernel,
            self.train.recompute,
        )


class TrainJob(ModelInTrainingJob):
    """Train one round over its mix: from its own last checkpoint, else from `start_from`, else from scratch."""

    checkpoint: CheckpointConfig
    start_from: Path | None = Field(description="Checkpoint whose weights the round starts from; null: random ones.")
    keeps_optimizer: bool = Field(default=False, description="Whether it also starts from its optimizer state.")
    evaluate: RepeatedEvaluation | None = Field(default=None, description="In-training evaluation.")

    def run(self, context: RankContext) -> None:
        """Train; see `trainer.train.train_round`. Only the weights stay in memory."""
        from trainer.data_parallel import unwrap
        from trainer.train import train_round

        train_round(self, context.corpus, context.model, context.bf16, context.stop)
        unwrap(context.model)

    @property
    def scoring_kernel(self) -> LossKernel:
        """Return the kernel of validation."""
        return self.score.loss_kernel

    def final_weights(self) -> Path | None:
        """Return the round's last checkpoint, or None if it is missing."""
        checkpoints = list_checkpoints(self.round_folder / "checkpoint")
        return checkpoints[-1] if checkpoints else None

    def saved_work(self) -> tuple[str | int, ...]:
        """Return the name of the last checkpoint."""
        last = self.final_weights()
        return () if last is None else (last.name,)


class LossJob(TrainedModelJob):
    """A job that writes losses of samples under the model of `weights`."""

    score: ScoreConfig
    origin: Origin = Field(description="Origin that the files of losses record.")

    def resolved(self) -> Self:
        """Return the job with the kernels that `auto` selects on its device."""
        from trainer.devices import resolve_kernel

        kernel = resolve_kernel("score.loss_kernel", self.score.loss_kernel, self.device)
        score = self.score.model_copy(update={"loss_kernel": kernel})
        return super().resolved().model_copy(update={"score": score})

    def kernels(self) -> "Kernels":
        """Return the kernels that losses are computed with."""
        from trainer.model import Kernels

        return Kernels.resolve(self.device, scoring=self.score.loss_kernel, activation=self.activation_kernel)

    @property
    def scoring_kernel(self) -> LossKernel:
        """Return the kernel that losses are computed with."""
        return self.score.loss_kernel


class ScoreJob(LossJob):
    """Compute the loss of every sample of every shard under the model of `weights`."""

    prefix: int | None = Field(default=None, description="Tokens of each sample that are scored; null: all.")

    def use(self, context: RankContext) -> None:
        """Score all shards; see `data_scoring.losses.shard_scoring.score_shards`."""
        from trainer.score import ModelScorer

        corpus, longest = context.corpus, self.prefix or context.corpus.seq_length
        scorer = ModelScorer(context.model, corpus, self.score.micro_batch_size, (longest,))
        files = LossFiles(self.round_folder, corpus, longest, self.fingerprint, self.origin)
        score_shards(corpus, scorer, files, context.progress)

    def saved_work(self) -> tuple[str | int, ...]:
        """Return the numbers of complete shards and of parts of shards."""
        losses = self.round_folder / "losses"
        return tuple(len(list(folder.glob("*.parquet"))) for folder in (losses, losses / "parts"))


class CalibrateJob(LossJob):
    """Score a random set of samples in full and by prefixes under the model of `weights`."""

    round_number: int = Field(description="Number of the round; the draw depends on it and on the seed.")

    def use(self, context: RankContext) -> None:
        """Score the drawn samples; see `data_scoring.losses.calibration.calibrate`."""
        from trainer.score import ModelScorer

        corpus = context.corpus
        drawn = draw_from(corpus, self.score.calibration_samples, self.seed, self.round_number)
        prefixes = (*candidate_prefixes(corpus.seq_length), corpus.seq_length)
        scorer = ModelScorer(context.model, corpus, self.score.micro_batch_size, prefixes)
        calibrate(corpus, self.round_folder, drawn, scorer, self.fingerprint, self.origin, context.progress)


class EvaluateJob(TrainedModelJob):
    """Answer the requests of tasks with the model of `weights`; tasks that have answers are not repeated."""

    evaluation: Evaluation
    answers: Path = Field(description="Folder of the answers, <task>.parquet.")
    loss_kernel: LossKernel = Field(description="How log-likelihoods are computed.")
    longest_block: int | None = Field(
        default=None,
        ge=0,
        description="Largest number of consecutive layers skipped; each block's answers have a folder.",
    )

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """Return the skipped blocks of layers as (first layer, length), shortest first, starting with no block."""
        layers, longest = self.model.num_layers, self.longest_block or 0
        return [(0, 0), *((start, length) for length in range(1, longest + 1) for start in range(layers - length + 1))]

    def part(self, start: int, length: int) -> tuple[Path, str]:
        """Return the folder of the answers without a block of layers, and the fingerprint of that model."""
        return self.answers / f"skip-{start:05d}-{length}", fingerprint(self.fingerprint, start, length)

    def resolved(self) -> Self:
        """Return the job with the kernels that `auto` selects on its device."""
        from trainer.devices import resolve_kernel

        kernel = resolve_kernel("score.loss_kernel", self.loss_kernel, self.device)
        return super().resolved().model_copy(update={"loss_kernel": kernel})

    def kernels(self) -> "Kernels":
        """Return the kernels that losses are computed with."""
        from trainer.model import Kernels

        return Kernels.resolve(self.device, scoring=self.loss_kernel, activation=self.activation_kernel)

    @property
    def scoring_kernel(self) -> LossKernel:
        """Return the kernel that losses are computed with."""
        return self.loss_kernel

    def use(self, context: RankContext) -> None:
        """Answer the tasks that have no answers yet; see `trainer.evaluate.answer_tasks`."""
        from trainer.evaluate import answer_tasks
        from trainer.layer_ablation import LayerBlock, skipping

        model, progress = context.model, context.progress
        tokenizer = open_tokenizer(context.corpus.tokenizer_path, self.evaluation.end_of_document)
        if self.longest_block is None:
            answer_tasks(model, self.evaluation, self.answers, self.fingerprint, tokenizer, progress)
            return
        for start, length in self.blocks:
            with skipping(model, LayerBlock(start, length)):
                answer_tasks(model, self.evaluation, *self.part(start, length), tokenizer, progress)

    def saved_work(self) -> tuple[str | int, ...]:
        """Return the number of files of answers."""
        # The answers for each block of layers have their own folder.
        return (len(list(self.answers.glob("**/*.parquet"))),)


class GenerateJob(TrainedModelJob):
    """Measure the generation speed of the model of `weights`; writes the round's generation.json."""

    batch_size: int = Field(default=20, description="Sequences generated at once.")
    num_prompt_tokens: int = Field(default=2, description="Prompt tokens of each sequence, drawn at random.")
    num_new_tokens: int = Field(default=510, description="Tokens generated for each sequence.")

    @property
    def layout(self) -> ParallelConfig:
        """Return the layout without sequence parallelism."""
        # A single token per step cannot be split along the sequence.
        return self.parallel.model_copy(update={"sequence": False})

    def use(self, context: RankContext) -> None:
        """Generate, and write generation.json; see `trainer.generate.measure_generation`."""
        from trainer.generate import measure_generation

        vocab_size = context.corpus.vocab_size
        measured = measure_generation(
            context.model, self.batch_size, self.num_prompt_tokens, self.num_new_tokens, vocab_size, self.seed
        )
        if context.is_writer:
            settings = {"fingerprint", "batch_size", "num_prompt_tokens", "num_new_tokens", "device", "parallel"}
            write_record(self.round_folder / "generation.json", {**self.model_dump(include=settings), **measured})


class AblationJob(TrainedModelJob):
    """Measure the loss of `weights` without each block of layers (layer ablation); writes `result`."""

    num_samples: int = Field(ge=1, description="Samples drawn at random from the shards; all, if there are fewer.")
    micro_batch_size: int = Field(ge=1, description="Samples of a forward pass on a rank.")
    longest_block: int = Field(default=3, ge=1, description="Largest number of consecutive layers skipped.")

    @property
    def result(self) -> Path:
        """Return the path of the measured losses."""
        return self.round_folder / "skips.parquet"

    def use(self, context: RankContext) -> None:
        """Measure; see `trainer.layer_ablation.measure_ablation`."""
        from trainer.layer_ablation import measure_ablation

        measure_ablation(self, context.corpus, context.model, context.progress)


class TaylorJob(TrainedModelJob):
    """Measure |weight · gradient| of every weight on random samples; writes a checkpoint to the round's taylor/."""

    num_samples: int = Field(ge=1, description="Samples drawn at random from the training shards.")
    micro_batch_size: int = Field(ge=1, description="Samples of a forward pass.")

    def use(self, context: RankContext) -> None:
        """Measure; see `trainer.taylor.measure_taylor`."""
        from trainer.taylor import measure_taylor

        measure_taylor(self, context.corpus, context.model, context.bf16)


class MaskJob(TrainedModelJob):
    """Learn, with frozen weights, which neurons a smaller model keeps; writes the round's masks.json."""

    student: ModelConfig = Field(description="The smaller model.")
    num_samples: int = Field(ge=1, description="Samples drawn at random from the training shards, used repeatedly.")
    micro_batch_size: int = Field(ge=1, description="Samples of a forward pass.")
    steps: int = Field(default=200, ge=1, description="Steps of Adam.")
    batch_size: int = Field(default=16, ge=1, description="Samples per step.")
    lr: float = Field(default=0.05, gt=0, description="Adam's learning rate for the masks' logits.")
    first_temperature: float = Field(default=2.0, gt=0, description="Temperature of the relaxation at the first step.")
    last_temperature: float = Field(
        default=0.2, gt=0, description="Temperature at the last step; it decreases geometrically."
    )

    def use(self, context: RankContext) -> None:
        """Learn; see `trainer.mask_learning.learn_masks`."""
        from trainer.mask_learning import learn_masks

        learn_masks(self, context.corpus, context.model)
