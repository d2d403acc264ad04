"""The 10 M parameter model: training, killing and resuming, scoring, evaluation and generation."""

import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq

from benchmarks.device.record import Record, read_record
from benchmarks.device.settings import (
    GLOBAL_BATCH,
    MICRO_BATCH,
    NUM_SCORED,
    NUM_STEPS,
    SEED,
    TOLERANCES,
    TRAINED_TOLERANCE,
    Place,
    Precision,
)
from benchmarks.measure import single_rank
from data_scoring.base.progress import silent
from data_scoring.config import LossKernel, ScoreConfig
from data_scoring.corpus.corpus import Corpus
from data_scoring.losses.shard_scoring import score_samples
from data_scoring.tokenizer.tokenizer import open_tokenizer
from flows.launch.launcher import launch
from flows.run.errors import RanksFailedError
from trainer.checkpoint_folder import list_checkpoints, read_checkpoint_record
from trainer.config import ActivationKernel, CheckpointConfig, ModelConfig, TrainConfig
from trainer.devices import Device, resolve_precision
from trainer.jobs import Evaluation, TrainJob
from trainer.parallel_config import ParallelConfig
from trainer.requests import Answer, read_answers, requests_path

TASKS = ("likelihoods", "generations")
EVERY_STEPS = 5


def training_job(
    place: Place,
    name: str,
    precision: Precision,
    kernels: tuple[LossKernel, ActivationKernel] = ("reference", "reference"),
    every_steps: int | None = None,
    model: ModelConfig | None = None,
) -> TrainJob:
    """Return a job that trains a model, by default the small one, on the prepared mix in the work folder `name`."""
    folder = place.work / name
    folder.mkdir(parents=True, exist_ok=True)
    (place.output / "logs").mkdir(exist_ok=True)
    shutil.copy(place.prepared / "mix.parquet", folder / "mix.parquet")
    train = TrainConfig(
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=MICRO_BATCH,
        lr=1e-4,
        min_lr=1e-5,
        precision=precision,
        loss_kernel=kernels[0],
        activation_kernel=kernels[1],
    )
    return TrainJob(
        corpus=place.corpus.absolute(),
        round_folder=folder.absolute(),
        model=model or place.small(),
        parallel=ParallelConfig(),
        device=place.kind,
        precision=precision,
        activation_kernel=kernels[1],
        seed=SEED,
        fingerprint=name,
        progress=(place.work / "progress.json").absolute(),
        errors=(place.work / "errors").absolute(),
        lock=(place.work / ".ranks.lock").absolute(),
        train=train,
        checkpoint=CheckpointConfig(every_minutes=1000, every_steps=every_steps),
        score=ScoreConfig(micro_batch_size=4),
        start_from=None,
    )


def train_here(job: TrainJob, device: Device) -> list[float]:
    """Return the loss of every step of a job, run in this process as the only rank."""
    from trainer.model import build_model
    from trainer.stopping import StopRequest
    from trainer.train import train_round

    device.seed(job.seed)
    corpus = Corpus(job.corpus)
    bf16 = resolve_precision(job.precision, device.kind) == "bfloat16"
    model = build_model(
        job.model, corpus.vocab_size, corpus.seq_length, job.layout, device.torch_device, bf16, job.kernels()
    )
    train_round(job, corpus, model, bf16, StopRequest())
    return step_losses(job.round_folder)


def step_losses(round_folder: Path) -> list[float]:
    """Return the loss of every step of a round, nats."""
    losses: list[float] = pq.read_table(round_folder / "steps.parquet")["loss"].to_pylist()
    return losses


def check_small_model(place: Place, record: Record) -> None:
    """Train in both precisions, and with fused kernels where supported; then evaluate, generate and score."""
    recorded = place.recorded()
    device = single_rank(place.kind)
    checkpoints: dict[Precision, Path] = {}
    for precision in TOLERANCES:
        job = training_job(place, precision, precision)
        losses = train_here(job, device)
        record.figures(**{f"losses_{precision}_nats": losses})
        _check_losses(record, f"training in {precision}", losses, recorded["losses"][precision], precision)
        checkpoints[precision] = list_checkpoints(job.round_folder / "checkpoint")[-1]
    _evaluate_and_generate(place, record, device, checkpoints["float32"])
    for precision, checkpoint in checkpoints.items():
        _score(place, record, device, precision, checkpoint)
    if "triton" in place.kernels:
        job = training_job(place, "triton", "float32", ("triton", "triton"))
        losses = train_here(job, device)
        _check_losses(record, "training in float32, Triton's kernels", losses, recorded["losses"]["float32"], "float32")


def _check_losses(
    record: Record,
    what: str,
    losses: list[float],
    expected: list[float],
    precision: Precision,
    against: str = "a CPU's",
) -> None:
    record.check(f"{what}: steps that are missing", abs(NUM_STEPS - len(losses)), 0)
    difference = _largest_difference(losses, expected)
    record.check(f"{what}: largest difference of a step's loss from {against}, nats", difference, TOLERANCES[precision])


def _largest_difference(found: Any, expected: Any) -> float:
    pairs = zip(np.ravel(found).tolist(), np.ravel(expected).tolist(), strict=True)
    return max(abs(one - other) for one, other in pairs)


def load_model(place: Place, device: Device, precision: Precision, checkpoint: Path, kernel: LossKernel) -> Any:
    """Return the model of a checkpoint, in evaluation mode, with `kernel` for scoring."""
    from trainer.checkpoint import load_weights
    from trainer.model import Kernels, build_model

    corpus = Corpus(place.corpus)
    bf16 = precision == "bfloat16"
    kernels = Kernels(scoring=kernel)
    model = build_model(
        place.small(), corpus.vocab_size, corpus.seq_length, ParallelConfig(), device.torch_device, bf16, kernels
    )
    load_weights(checkpoint, model)
    return model.eval()


def score_here(place: Place, model: Any) -> list[float]:
    """Return the losses of the first samples of the corpus."""
    from trainer.score import ModelScorer

    corpus = Corpus(place.corpus)
    shards, samples = np.zeros(NUM_SCORED, np.int64), np.arange(NUM_SCORED)
    found = score_samples(corpus, ModelScorer(model, corpus, 4), shards, samples, corpus.lengths(0)[:NUM_SCORED])
    assert found is not None
    losses: list[float] = found[:, 0].tolist()
    return losses


def _score(place: Place, record: Record, device: Device, precision: Precision, checkpoint: Path) -> None:
    """Check scoring with every kernel: in float32 against a CPU's losses, in bfloat16 against the reference kernel."""
    expected = place.recorded()["scores"] if precision == "float32" else None
    for kernel in place.kernels:
        losses = score_here(place, load_model(place, device, precision, checkpoint, kernel))
        against, tolerance = "a CPU's", TRAINED_TOLERANCE
        if expected is None:
            expected = losses
        if precision == "bfloat16":
            against, tolerance = "the reference's", TOLERANCES[precision]
        what = f"scoring in {precision}, {kernel}: largest difference of a sample's loss from {against}, nats"
        record.check(what, _largest_difference(losses, expected), tolerance)


def answer_here(place: Place, model: Any, answers: Path) -> dict[str, list[Answer]]:
    """Return the answers of `model` to the prepared requests of each task, also written to the folder `answers`."""
    from trainer.evaluate import answer_tasks

    evaluation = Evaluation(requests=place.prepared / "requests", tasks=TASKS)
    answer_tasks(model, evaluation, answers, "device check", open_tokenizer(Corpus(place.corpus).tokenizer_path, None))
    return {task: read_answers(requests_path(answers, task)) for task in TASKS}


def _evaluate_and_generate(place: Place, record: Record, device: Device, checkpoint: Path) -> None:
    from trainer.generate import measure_generation

    model = load_model(place, device, "float32", checkpoint, "reference")
    found = answer_here(place, model, place.work / "answers")
    expected = {task: read_answers(requests_path(place.prepared / "answers", task)) for task in TASKS}
    lengths = place.recorded()["continuation_lengths"]
    differences = [
        abs(one[0] - other[0]) / length
        for one, other, length in zip(found["likelihoods"], expected["likelihoods"], lengths, strict=True)
    ]
    what = "evaluating in float32: largest difference of a log-likelihood from a CPU's, nats a token"
    record.check(what, max(differences), TRAINED_TOLERANCE)
    same = [one == other for one, other in zip(found["generations"], expected["generations"], strict=True)]
    record.figures(generations_as_on_a_cpu=f"{sum(same)} of {len(same)}")
    corpus = Corpus(place.corpus)
    num_new_tokens = corpus.seq_length - 2
    measured = measure_generation(model, 20, 2, num_new_tokens, corpus.vocab_size, SEED)
    record.figures(generated_tokens_per_second=measured["tokens_per_second"])
    tokens = measured["first_sequence"]
    record.check("generating: tokens that are missing", abs(2 + num_new_tokens - len(tokens)), 0)
    record.check("generating: largest token", max(tokens), corpus.vocab_size - 1)


def check_resuming(place: Place, record: Record) -> None:
    """Train in bfloat16 under the launcher, kill the rank once it has saved a checkpoint, and resume."""
    job = training_job(place, "resumed", "bfloat16", every_steps=EVERY_STEPS)
    killer = threading.Thread(target=_kill_rank_that_saved, args=(job.round_folder / "checkpoint",), daemon=True)
    killer.start()
    try:
        launch(job, place.output, "killed", silent)
        was_killed = False
    except RanksFailedError as error:
        was_killed = "SIGKILL" in str(error)
    record.check("killing: ranks that were not ended by SIGKILL", int(not was_killed), 0)
    saved = [
        read_checkpoint_record(checkpoint)["step"] for checkpoint in list_checkpoints(job.round_folder / "checkpoint")
    ]
    record.figures(killed_with_checkpoints_of_steps=saved)
    started = time.monotonic()
    launch(job, place.output, "resumed", silent)
    record.figures(seconds_of_the_resumed_launch=time.monotonic() - started)
    losses = step_losses(job.round_folder)
    record.figures(losses_resumed_nats=losses)
    _check_losses(record, "resuming in bfloat16", losses, place.recorded()["losses"]["bfloat16"], "bfloat16")
    unbroken = read_record(place.output / "parts" / "small_model.json")["figures"].get("losses_bfloat16_nats")
    if unbroken is not None:
        _check_losses(record, "resuming in bfloat16", losses, unbroken, "bfloat16", "unbroken training's")


def _kill_rank_that_saved(checkpoints: Path) -> None:
    """Kill the rank launched by this process as soon as there is a checkpoint."""
    rank = None
    while rank is None:
        time.sleep(0.05)
        found = [child for child in psutil.Process().children(recursive=True) if _is_rank(child)]
        rank = found[0] if found else None
    # A step of a small model is short on a device, so poll frequently.
    while not list_checkpoints(checkpoints):
        time.sleep(0.002)
    os.kill(rank.pid, signal.SIGKILL)


def _is_rank(process: psutil.Process) -> bool:
    try:
        return "trainer.worker" in process.cmdline() and "trainer.agent" not in process.cmdline()
    except psutil.NoSuchProcess:
        return False
