"""The speed of training and scoring on this host's CPU, measured for a few seconds."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field
from typing_extensions import TypedDict

from data_scoring.base.progress import silent
from data_scoring.base.temporary_folders import temporary_folder
from data_scoring.base.validation import required_record
from data_scoring.corpus.corpus import Corpus
from flows.launch import launcher
from flows.launch.job_fields import job_fields
from flows.planning.corpus_size import CorpusSize, prepared_size, sampled_corpus
from flows.run.config import RunConfig
from flows.run.folder import Run
from trainer.flops import idle_microbatches, model_flops
from trainer.hardware import Hardware
from trainer.measurement import MeasureJob
from trainer.memory import Workload

# Of a microbatch, or of scoring one. A core computes some 1e10 a second.
_MOST_FLOPS = 2e11
# To train, and to score.
_SECONDS = 3.0
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Record(TypedDict):
    seconds_a_step: Seconds
    seconds_a_scored_token: Seconds
    seconds: Seconds


@dataclass(frozen=True)
class MeasuredSpeed:
    """Seconds that parts of a run take on this host: of a launch, its ranks' start; of a byte of text, preparing it."""

    launch: float
    step: float
    scored_token: float
    byte: float


def is_measurable(config: RunConfig, workload: Workload, hardware: Hardware) -> bool:
    """Return whether the run's speed can be measured here in a few seconds: on this host's CPU, with a small model."""
    launch = config.launch
    if hardware.kind != "cpu" or launch.nodes > 1 or not launch.launcher_kind.sees_devices:
        return False
    tokens = max(workload.micro_batch_tokens, config.score.micro_batch_size * workload.seq_length)
    return model_flops(workload.model, workload.vocab_size, workload.seq_length) * tokens < _MOST_FLOPS


def measure(config: RunConfig, num_microbatches: int) -> tuple[MeasuredSpeed, CorpusSize]:
    """Return the measured speed of a run of `config` on this host's CPU, and the size of its corpus.

    num_microbatches: of a step on each replica. Of large batches, a part is measured. Raises ValueError if the text
    cannot be read.
    """
    run = Run(config, config.folder.absolute())
    with temporary_folder() as folder:
        size, seconds_a_byte = prepared_size(run), 0.0
        if size is None:
            started = time.monotonic()
            corpus, size = sampled_corpus(config, folder)
            sampled = sum(source["bytes"] for source in corpus.manifest["sources"])
            seconds_a_byte = (time.monotonic() - started) / sampled
        else:
            corpus = run.corpus()
        launch, record, measured = _measure(config, corpus, folder, num_microbatches)
    idle = idle_microbatches(config.parallel)
    step = record["seconds_a_step"] * (num_microbatches + idle) / (measured + idle)
    return MeasuredSpeed(launch, step, record["seconds_a_scored_token"], seconds_a_byte), size


def _measure(config: RunConfig, corpus: Corpus, folder: Path, num_microbatches: int) -> tuple[float, _Record, int]:
    """Return the seconds of the ranks' start, what they measured, and the microbatches that they measured with."""
    run = Run(config, folder)
    round_folder = run.round_folder(1)
    round_folder.mkdir(parents=True)
    measured = min(num_microbatches, 4 * config.parallel.pipeline)
    fields = {**job_fields(run, 1, "measurement"), "corpus": corpus.folder}
    job = MeasureJob(
        **fields, train=config.resolved_train, score=config.score, num_microbatches=measured, seconds=_SECONDS
    )
    started = time.monotonic()
    launcher.launch(job, folder, "measure", silent)
    elapsed = time.monotonic() - started
    record = required_record(round_folder / "speed.json", _Record)
    return max(0.0, elapsed - record["seconds"]), record, measured
