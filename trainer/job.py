"""Jobs: the launcher writes a job as JSON; every rank reads the file and does its part.

A job is a subclass of `Job` or of `TrainedModelJob`, in any module that workers can import: the file names the class.
Modules that need Megatron are imported inside the methods: Megatron must not be imported before the device is
initialised, and launchers import jobs on hosts without devices.
"""

import pkgutil
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field

from data_scoring.base.files import write_record
from data_scoring.base.messages import shown
from data_scoring.base.progress import Progress
from data_scoring.base.validation import read_record, validated
from data_scoring.config import Config, LossKernel
from data_scoring.corpus.corpus import Corpus
from trainer.checkpoint_folder import SECONDS_TO_STOP
from trainer.config import ActivationKernel, ModelConfig
from trainer.parallel_config import ParallelConfig

if TYPE_CHECKING:
    from trainer.model import Kernels
    from trainer.model_chunks import ModelChunks
    from trainer.stopping import StopRequest


@dataclass(frozen=True)
class RankContext:
    """What a rank passes to its job; the process group and Megatron's parallel state are initialised.

    model: built from the job's `model`, `layout` and `kernels`, with random weights, on the rank's device.
    bf16: whether the model computes in bfloat16, else float32.
    stop: whether the ranks were asked to save and end.
    is_writer: whether this rank writes the results; exactly one rank does, one that holds the losses.
    progress: reports the job's progress; does nothing on ranks that do not write.
    weights: the checkpoint whose weights the model has, because an earlier job of these ranks left them.
    """

    corpus: Corpus
    model: "ModelChunks"
    bf16: bool
    stop: "StopRequest"
    is_writer: bool
    progress: Progress
    weights: Path | None = None


class Job(Config):
    """The fields that every job has: the corpus, the model, the device and the layout."""

    corpus: Path = Field(description="Folder of the corpus.")
    round_folder: Path = Field(description="Folder of the round, where results go.")
    model: ModelConfig
    parallel: ParallelConfig
    device: Literal["cuda", "npu", "cpu"]
    precision: Literal["auto", "float32", "bfloat16"]
    activation_kernel: ActivationKernel
    seed: int
    fingerprint: str = Field(description="Identifies the stage's inputs; results with another are not reused.")
    progress: Path = Field(description="File that the progress is written to.")
    errors: Path = Field(description="Folder that a failing rank writes its error to.")
    lock: Path = Field(description="File that every rank holds a shared lock on while it runs.")
    seconds_to_stop: float = Field(
        default=SECONDS_TO_STOP, gt=0, description="Seconds that ranks have to save and end after a stop request."
    )

    @abstractmethod
    def run(self, context: RankContext) -> None:
        """Do the job on one of its ranks; all ranks call this.

        Raises ValueError, with a message for the user, if the user can fix the cause.
        """

    @property
    def layout(self) -> ParallelConfig:
        """Return how the model is divided among the ranks."""
        return self.parallel

    def resolved(self) -> Self:
        """Return the job with the kernels that `auto` selects on its device, on a host that has such devices.

        Raises ValueError if a kernel is requested by name and is not installed or does not run there.
        """
        from trainer.devices import resolve_kernel

        kernel = resolve_kernel("train.activation_kernel", self.activation_kernel, self.device)
        return self.model_copy(update={"activation_kernel": kernel})

    def kernels(self) -> "Kernels":
        """Return the kernels that the model is built with, resolved for its device."""
        from trainer.model import Kernels

        return Kernels.resolve(self.device, activation=self.activation_kernel)

    @property
    def scoring_kernel(self) -> LossKernel | None:
        """Return the kernel that the model computes losses with in evaluation mode, or None for the default."""
        return None

    def can_follow(self, other: "Job") -> bool:
        """Return whether ranks that have done `other` can do this job with the same model."""
        return False

    def final_weights(self) -> Path | None:
        """Return the checkpoint whose weights the model has after the job, or None if it has others."""
        return None

    def saved_work(self) -> tuple[str | int, ...]:
        """Return a comparable value for the saved work that a restart resumes from; it changes with every save.

        A job that saves nothing before its end always returns the same value.
        """
        return ()


# Fields that decide what ranks are set up with.
_SETUP = {"corpus", "model", "parallel", "device", "precision", "activation_kernel", "progress", "errors", "lock"}


class TrainedModelJob(Job):
    """A job that uses a trained model: it loads a checkpoint's weights and does not change them."""

    weights: Path = Field(description="Checkpoint whose weights are loaded.")

    def run(self, context: RankContext) -> None:
        """Load the weights, unless the model has them, and use the model."""
        from trainer.checkpoint import load_weights

        if context.weights != self.weights:
            load_weights(self.weights, context.model)
        context.model.eval()
        self.use(context)

    def can_follow(self, other: Job) -> bool:
        """Return whether the ranks of `other` have the same corpus, layout and device, and an equally built model."""
        return _setup(self) == _setup(other)

    def final_weights(self) -> Path | None:
        """Return the checkpoint that was loaded."""
        return self.weights

    @abstractmethod
    def use(self, context: RankContext) -> None:
        """Do the job with `context.model`, whose weights are loaded and which is in evaluation mode."""


def _setup(job: Job) -> tuple[Any, ...]:
    return job.model_dump(include=_SETUP), job.layout, job.scoring_kernel


def write_job(job: Job, path: Path) -> None:
    """Write `job` to `path`, with the name of its class, module:class, as `class`."""
    kind = type(job)
    write_record(path, {"class": f"{kind.__module__}:{kind.__qualname__}", **job.model_dump(mode="json")})


def read_job(path: Path) -> Job:
    """Return the job that `write_job` wrote to `path`.

    Imports the module that the file names. Raises ValueError if the file is missing or damaged, or if the named object
    is not a job class.
    """
    remedy = "launch the job again"
    content = read_record(path, dict[str, Any], remedy)
    if content is None:
        raise ValueError(f"{path}: no such file; {remedy}")
    name = content.pop("class", None)
    try:
        kind = pkgutil.resolve_name(name) if isinstance(name, str) else None
    except (ValueError, ImportError, AttributeError):
        kind = None
    if not (isinstance(kind, type) and issubclass(kind, Job)):
        raise ValueError(f"{path}: class: {shown(name)} is not a subclass of trainer.job.Job; {remedy}")
    return validated(kind, content, path, remedy)
