"""Settings of the check: models, shapes, tolerances, and the reduced sizes for a CPU."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_scoring.base.files import read_json
from data_scoring.config import LossKernel
from trainer.config import ModelConfig, Precision

SEED = 1
# Small enough, with few tokens per step, that a CPU records the reference losses in a minute: at most 10 M parameters.
SMALL = ModelConfig.model_validate({"preset": "pangu-pi-10m"})
REDUCED_SMALL = ModelConfig.model_validate({"preset": "pangu-pi-2m", "num_layers": 2})
SMALL_SEQ_LENGTH = 64
NUM_STEPS = 20
MICRO_BATCH, GLOBAL_BATCH = 2, 4
NUM_SCORED = 16
# Largest allowed difference of a step's loss from the recorded one, nats.
TOLERANCES: dict[Precision, float] = {"float32": 1e-4, "bfloat16": 1e-2}
# Largest allowed difference of losses and log-likelihoods under trained weights from recorded ones, nats per token.
TRAINED_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Sizes:
    """The shapes of the large workloads: `heads` are (tokens, vocabulary, channels), `activation` (tokens, width).

    matrix: size of the square matrices whose bfloat16 product gives a device's reference speed.
    """

    large: ModelConfig
    seq_length: int
    timed_steps: int
    matrix: int
    heads: tuple[tuple[int, int, int], ...]
    activation: tuple[int, int]


_1B = ModelConfig.model_validate({"preset": "pangu-pi-1b-pro"})
_TINY = ModelConfig.model_validate({"preset": "pangu-pi-2m", "num_layers": 2, "vocab_size": 2048})
FULL = Sizes(_1B, 2048, 10, 8192, ((8192, 48_000, 1792), (8192, 131_072, 4096)), (8192, _1B.ffn_size))
REDUCED = Sizes(_TINY, 64, 3, 512, ((256, 2048, 128),), (256, _TINY.ffn_size))


@dataclass(frozen=True)
class Place:
    """Where a part runs: the prepared folder, the output folder and the kind of device."""

    prepared: Path
    output: Path
    kind: Literal["cuda", "npu", "cpu"]

    @property
    def sizes(self) -> Sizes:
        """Return the shapes for this device."""
        return REDUCED if self.kind == "cpu" else FULL

    @property
    def corpus(self) -> Path:
        """Return the folder of the corpus."""
        return self.prepared / "corpus"

    @property
    def work(self) -> Path:
        """Return the folder for temporary files of a part."""
        return self.output / "work"

    def empty_work(self) -> None:
        """Recreate the folder `work`."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()

    @property
    def kernels(self) -> tuple[LossKernel, ...]:
        """Return the loss kernels that run on the device."""
        return ("reference", "chunked", "triton") if self.kind == "cuda" else ("reference", "chunked")

    def small(self) -> ModelConfig:
        """Return the small model, with which the reference losses were recorded."""
        return ModelConfig.model_validate(self.recorded()["model"])

    def recorded(self) -> dict[str, Any]:
        """Return the reference results recorded on a CPU. Raises ValueError if nothing is prepared."""
        recorded: dict[str, Any] | None = read_json(self.prepared / "recorded.json")
        if recorded is None:
            raise ValueError(
                f"{self.prepared}: has no recorded.json; write it with `python -m benchmarks.device prepare "
                f"{self.prepared}`, where all packages are installed"
            )
        return recorded
