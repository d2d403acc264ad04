"""What a worker is told to do: jobs, written as JSON by whoever launches it."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from data_scoring.base.files import fingerprint
from data_scoring.config import Config, LossKernel, ScoreConfig
from data_scoring.losses.origin import Origin
from trainer.checkpoint_folder import SECONDS_TO_STOP
from trainer.config import ActivationKernel, CheckpointConfig, ModelConfig, ParallelConfig, TrainConfig


class Job(Config):
    """What every job says: which corpus, which model, on which devices in which layout."""

    corpus: Path = Field(description="Folder of the corpus.")
    round_folder: Path = Field(description="Folder of the round, where results go.")
    model: ModelConfig
    parallel: ParallelConfig
    device: Literal["cuda", "npu", "cpu"]
    precision: Literal["auto", "float32", "bfloat16"]
    activation_kernel: ActivationKernel
    seed: int
    fingerprint: str = Field(description="Identifies the stage's inputs; results of another are not reused.")
    progress: Path = Field(description="File that says how far the work is.")
    errors: Path = Field(description="Folder where a failing rank leaves its error.")
    lock: Path = Field(description="File that every rank holds a shared lock on while it lives.")
    seconds_to_stop: float = Field(
        default=SECONDS_TO_STOP, gt=0, description="Time that ranks get to save and end once they are told to stop."
    )


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

    kind: Literal["train"] = "train"
    train: TrainConfig
    checkpoint: CheckpointConfig
    score: ScoreConfig
    start_from: Path | None = Field(description="Checkpoint whose weights the round starts from; null: random ones.")
    evaluate: RepeatedEvaluation | None = Field(default=None, description="What is asked while it trains.")


class ScoreJob(Job):
    """Score every sample of every shard by its loss under the model of `checkpoint`."""

    kind: Literal["score"] = "score"
    score: ScoreConfig
    weights: Path = Field(description="Checkpoint that is scored with.")
    origin: Origin = Field(description="What the losses files say of where they come from.")
    prefix: int | None = Field(default=None, description="Tokens of each sample that are looked at; null: all.")


class CalibrateJob(Job):
    """Score a random set of samples in full and by prefixes under the model of `checkpoint`."""

    kind: Literal["calibrate"] = "calibrate"
    score: ScoreConfig
    weights: Path = Field(description="Checkpoint that is scored with.")
    origin: Origin = Field(description="What the calibration set's file says of where its losses come from.")
    round_number: int = Field(description="Number of the round, which decides with the seed what is drawn.")


class EvaluateJob(Job):
    """Answer the requests of tasks with the model of `checkpoint`; tasks that have their answers are done."""

    kind: Literal["evaluate"] = "evaluate"
    weights: Path = Field(description="Checkpoint that answers; `fingerprint` stands for it in what the answers bear.")
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


class GenerateJob(Job):
    """Measure how fast the model of `checkpoint` generates, into the round's generation.json."""

    kind: Literal["generate"] = "generate"
    weights: Path = Field(description="Checkpoint that generates.")
    batch_size: int = Field(default=20, description="Sequences generated at once.")
    num_prompt_tokens: int = Field(default=2, description="Tokens each starts with, drawn at random.")
    num_new_tokens: int = Field(default=510, description="Tokens each goes on for.")


class AblationJob(Job):
    """Measure what skipping each block of layers does to the loss of `checkpoint`, into `result`."""

    kind: Literal["skip"] = "skip"
    weights: Path = Field(description="Checkpoint whose layers are skipped.")
    num_samples: int = Field(ge=1, description="Samples drawn at random from the shards; all, where there are fewer.")
    micro_batch_size: int = Field(ge=1, description="Samples a rank goes through the layers with at once.")
    longest_block: int = Field(default=3, ge=1, description="Layers, one after another, that are skipped at most.")

    @property
    def result(self) -> Path:
        """Return the file that says what skipping costs."""
        return self.round_folder / "skips.parquet"


class TaylorJob(Job):
    """Measure |weight · gradient| of every weight on random samples, as a checkpoint into the round's taylor/."""

    kind: Literal["taylor"] = "taylor"
    weights: Path = Field(description="Checkpoint that is measured.")
    num_samples: int = Field(ge=1, description="Samples drawn at random from the training shards.")
    micro_batch_size: int = Field(ge=1, description="Samples a forward pass takes at once.")


class MaskJob(Job):
    """Learn with frozen weights which neurons a smaller model is best made of, into the round's masks.json."""

    kind: Literal["masks"] = "masks"
    weights: Path = Field(description="Checkpoint of the larger model, with as many layers as the smaller one.")
    student: ModelConfig = Field(description="The smaller model.")
    num_samples: int = Field(ge=1, description="Samples drawn at random from the training shards, gone through anew.")
    micro_batch_size: int = Field(ge=1, description="Samples a forward pass takes at once.")
    steps: int = Field(default=200, ge=1, description="Steps of Adam.")
    batch_size: int = Field(default=16, ge=1, description="Samples a step.")
    lr: float = Field(default=0.05, gt=0, description="Adam's learning rate, of the masks' logits.")
    first_temperature: float = Field(default=2.0, gt=0, description="Temperature of the relaxation at the first step.")
    last_temperature: float = Field(default=0.2, gt=0, description="And at the last; it falls geometrically.")


AnyJob = Annotated[
    TrainJob | ScoreJob | CalibrateJob | EvaluateJob | GenerateJob | AblationJob | TaylorJob | MaskJob,
    Field(discriminator="kind"),
]
