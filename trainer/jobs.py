"""The jobs of a run's stages: train, score, calibrate, evaluate, and what is measured on a trained model."""

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from data_scoring.base.files import fingerprint, write_json
from data_scoring.config import Config, LossKernel, ScoreConfig
from data_scoring.losses.calibration import calibrate, candidate_prefixes, draw_from
from data_scoring.losses.origin import Origin
from data_scoring.losses.shard_scoring import LossFiles, score_shards
from data_scoring.tokenizer.tokenizer import open_tokenizer
from trainer.checkpoint_folder import list_checkpoints
from trainer.config import CheckpointConfig, ModelConfig, ParallelConfig, TrainConfig
from trainer.job import Job, RankContext, TrainedModelJob

if TYPE_CHECKING:
    from trainer.model import Kernels


class Evaluation(Config):
    """What a model is asked: a file of requests a task, as `trainer.requests` has them."""

    requests: Path = Field(description="Folder of the requests, <task>.parquet.")
    tasks: tuple[str, ...] = Field(min_length=1, description="Tasks, in the order in which they are answered.")
    end_of_document: str | None = Field(
        default=None, description="Token that ends documents, where the tokenizer does not tell."
    )


class RepeatedEvaluation(Evaluation):
    """What a model is asked in the middle of its training, every so many steps."""

    answers: Path = Field(description="Folder of the answers, step-<number>/<task>.parquet.")
    every_steps: int = Field(ge=1, description="Steps from one evaluation to the next.")


class TrainJob(Job):
    """Train one round over its mix: from its own last checkpoint, else from `start_from`, else from scratch."""

    train: TrainConfig
    checkpoint: CheckpointConfig
    score: ScoreConfig
    start_from: Path | None = Field(description="Checkpoint whose weights the round starts from; null: random ones.")
    evaluate: RepeatedEvaluation | None = Field(default=None, description="What is asked while it trains.")

    def kernels(self) -> "Kernels":
        """Return training's kernels, with scoring's for validation."""
        from trainer.model import Kernels

        return Kernels(self.train.loss_kernel, self.score.loss_kernel, self.activation_kernel)

    def run(self, context: RankContext) -> None:
        """Train; see `trainer.train.train_round`."""
        from trainer.train import train_round

        train_round(self, context.corpus, context.model, context.bf16, context.stop)

    def saved_work(self) -> tuple[str | int, ...]:
        """Return the name of the last checkpoint."""
        checkpoints = list_checkpoints(self.round_folder / "checkpoint")
        return (checkpoints[-1].name,) if checkpoints else ()


class ScoreJob(TrainedModelJob):
    """Score every sample of every shard by its loss under the model of `weights`."""

    score: ScoreConfig
    origin: Origin = Field(description="What the losses files say of where they come from.")
    prefix: int | None = Field(default=None, description="Tokens of each sample that are looked at; null: all.")

    def kernels(self) -> "Kernels":
        """Return the kernels that losses are computed with."""
        from trainer.model import Kernels

        return Kernels(scoring=self.score.loss_kernel, activation=self.activation_kernel)

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


class CalibrateJob(TrainedModelJob):
    """Score a random set of samples in full and by prefixes under the model of `weights`."""

    score: ScoreConfig
    origin: Origin = Field(description="What the calibration set's file says of where its losses come from.")
    round_number: int = Field(description="Number of the round, which decides with the seed what is drawn.")

    def kernels(self) -> "Kernels":
        """Return the kernels that losses are computed with."""
        from trainer.model import Kernels

        return Kernels(scoring=self.score.loss_kernel, activation=self.activation_kernel)

    def use(self, context: RankContext) -> None:
        """Score what is drawn; see `data_scoring.losses.calibration.calibrate`."""
        from trainer.score import ModelScorer

        corpus = context.corpus
        drawn = draw_from(corpus, self.score.calibration_samples, self.seed, self.round_number)
        prefixes = (*candidate_prefixes(corpus.seq_length), corpus.seq_length)
        scorer = ModelScorer(context.model, corpus, self.score.micro_batch_size, prefixes)
        calibrate(corpus, self.round_folder, drawn, scorer, self.fingerprint, self.origin, context.progress)


class EvaluateJob(TrainedModelJob):
    """Answer the requests of tasks with the model of `weights`; tasks that have their answers are done."""

    evaluation: Evaluation
    answers: Path = Field(description="Folder of the answers, <task>.parquet.")
    loss_kernel: LossKernel = Field(description="How log-likelihoods are computed.")
    longest_block: int | None = Field(
        default=None,
        ge=0,
        description="Layers in a row skipped at most; answers have a folder a block.",
    )

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """Return the blocks of layers that are skipped, as the first layer and their number; none, then ever longer."""
        layers, longest = self.model.num_layers, self.longest_block or 0
        return [(0, 0), *((start, length) for length in range(1, longest + 1) for start in range(layers - length + 1))]

    def part(self, start: int, length: int) -> tuple[Path, str]:
        """Return the folder of what the model answers without a block of layers, and what such a model is known by."""
        return self.answers / f"skip-{start:05d}-{length}", fingerprint(self.fingerprint, start, length)

    def kernels(self) -> "Kernels":
        """Return the kernels that losses are computed with."""
        from trainer.model import Kernels

        return Kernels(scoring=self.loss_kernel, activation=self.activation_kernel)

    def use(self, context: RankContext) -> None:
        """Answer what has no answer yet; see `trainer.evaluate.answer_tasks`."""
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
        # Answers without a block of layers have a folder each.
        return (len(list(self.answers.glob("**/*.parquet"))),)


class GenerateJob(TrainedModelJob):
    """Measure how fast the model of `weights` generates, into the round's generation.json."""

    batch_size: int = Field(default=20, description="Sequences generated at once.")
    num_prompt_tokens: int = Field(default=2, description="Tokens each starts with, drawn at random.")
    num_new_tokens: int = Field(default=510, description="Tokens each goes on for.")

    @property
    def layout(self) -> ParallelConfig:
        """Return the layout without sequence parallelism."""
        # A token at a time is no sequence that ranks could share.
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
            write_json(self.round_folder / "generation.json", {**self.model_dump(include=settings), **measured})


class AblationJob(TrainedModelJob):
    """Measure what skipping each block of layers does to the loss of `weights`, into `result`."""

    num_samples: int = Field(ge=1, description="Samples drawn at random from the shards; all, where there are fewer.")
    micro_batch_size: int = Field(ge=1, description="Samples a rank goes through the layers with at once.")
    longest_block: int = Field(default=3, ge=1, description="Layers, one after another, that are skipped at most.")

    @property
    def result(self) -> Path:
        """Return the file that says what skipping costs."""
        return self.round_folder / "skips.parquet"

    def use(self, context: RankContext) -> None:
        """Measure; see `trainer.layer_ablation.measure_ablation`."""
        from trainer.layer_ablation import measure_ablation

        measure_ablation(self, context.corpus, context.model, context.progress)


class TaylorJob(TrainedModelJob):
    """Measure |weight · gradient| of every weight on random samples, as a checkpoint into the round's taylor/."""

    num_samples: int = Field(ge=1, description="Samples drawn at random from the training shards.")
    micro_batch_size: int = Field(ge=1, description="Samples a forward pass takes at once.")

    def use(self, context: RankContext) -> None:
        """Measure; see `trainer.taylor.measure_taylor`."""
        from trainer.taylor import measure_taylor

        measure_taylor(self, context.corpus, context.model, context.bf16)


class MaskJob(TrainedModelJob):
    """Learn with frozen weights which neurons a smaller model is best made of, into the round's masks.json."""

    student: ModelConfig = Field(description="The smaller model.")
    num_samples: int = Field(ge=1, description="Samples drawn at random from the training shards, gone through anew.")
    micro_batch_size: int = Field(ge=1, description="Samples a forward pass takes at once.")
    steps: int = Field(default=200, ge=1, description="Steps of Adam.")
    batch_size: int = Field(default=16, ge=1, description="Samples a step.")
    lr: float = Field(default=0.05, gt=0, description="Adam's learning rate, of the masks' logits.")
    first_temperature: float = Field(default=2.0, gt=0, description="Temperature of the relaxation at the first step.")
    last_temperature: float = Field(default=0.2, gt=0, description="And at the last; it falls geometrically.")

    def use(self, context: RankContext) -> None:
        """Learn; see `trainer.mask_learning.learn_masks`."""
        from trainer.mask_learning import learn_masks

        learn_masks(self, context.corpus, context.model)
