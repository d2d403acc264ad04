"""How long parts of a run take: training, scoring, and what comes besides."""

import math
from dataclasses import dataclass

from data_scoring.refine.budget import FORWARD_COST
from flows.planning.corpus_size import CorpusSize
from flows.planning.measured_speed import MeasuredSpeed
from flows.run.config import RunConfig
from trainer.flops import model_flops, pipeline_bubble
from trainer.hardware import Hardware
from trainer.memory import Workload

# Start of Prefect's temporary server, and the report, in starts of ranks: all three import and compile on one core.
_FLOW_LAUNCHES = 4


@dataclass(frozen=True)
class Duration:
    """How long parts of a run take: measured, or by FLOPs and an assumed share of the devices' peak.

    speed: as measured; None: not measured.
    """

    config: RunConfig
    workload: Workload
    hardware: Hardware
    utilisation: float
    speed: MeasuredSpeed | None

    def tokens_per_second(self) -> float | None:
        """Return the tokens that all devices train on in a second, or None if their peak is not known."""
        train, parallel = self.workload.train, self.workload.parallel
        if self.speed is not None:
            return train.global_batch_size * self.workload.seq_length / self.speed.step
        if self.hardware.peak_flops is None:
            return None
        flops = model_flops(self.workload.model, self.workload.vocab_size, self.workload.seq_length)
        bubble = pipeline_bubble(parallel, self.workload.num_microbatches)
        return parallel.world_size * self.hardware.peak_flops * self.utilisation / (flops * bubble)

    def training(self, samples: int, steps: int, size: CorpusSize) -> float | None:
        """Return the seconds of training on `samples`, with the validations in between."""
        speed = self.tokens_per_second()
        if speed is None:
            return None
        validations = math.ceil(steps / self.config.train.validate_every_steps)
        validating = self._forward(validations * size.num_validation_samples * self.workload.seq_length)
        start = self.speed.launch if self.speed is not None else 0.0
        return start + samples * self.workload.seq_length / speed + (validating or 0.0)

    def scoring(self, samples: int, prefix: int | None) -> float | None:
        """Return the seconds of scoring the first `prefix` tokens, None: all, of so many samples, on trained ranks."""
        return self._forward(samples * min(prefix or self.workload.seq_length, self.workload.seq_length))

    def other(self, size: CorpusSize | None) -> float:
        """Return the seconds of preparing the corpus, of Prefect's start and of the report; 0 if not measured."""
        if self.speed is None:
            return 0.0
        return self.speed.byte * (size.text_bytes if size is not None else 0) + _FLOW_LAUNCHES * self.speed.launch

    def basis(self) -> str:
        """Return where the speed comes from, in words."""
        if self.speed is not None:
            return f"measured on this host: {self.speed.step:.2f} s a step, {self.speed.launch:.1f} s to start ranks"
        if self.hardware.peak_flops is None:
            if self.hardware.kind == "cpu":
                return "unknown: on CPU, only small models on one host are measured"
            return "unknown: the devices' peak FLOP/s is not known; name known ones with --assume"
        return (
            f"an assumption, not measured: {self.utilisation:.0%} (--utilisation) of "
            f"{self.hardware.peak_flops / 1e12:,.0f} TFLOP/s a device in bfloat16, by its data sheet"
        )

    def _forward(self, tokens: int) -> float | None:
        if self.speed is not None:
            return tokens * self.speed.scored_token
        speed = self.tokens_per_second()
        return None if speed is None else tokens * FORWARD_COST / speed
