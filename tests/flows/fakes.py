"""Ranks that write what is asked of them instead of training, and the corpus and configuration that they are given."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tokenizers

from data_scoring.base.files import fingerprint, write_json
from data_scoring.base.parquet import write_parquet
from data_scoring.base.progress import Progress
from data_scoring.corpus.corpus import Corpus
from data_scoring.losses.shard_scoring import losses_path, write_losses
from data_scoring.refine.training_mix import Mix
from flows.launch import launcher
from tests.conftest import make_documents
from trainer.job import Job
from trainer.jobs import AblationJob, EvaluateJob, Evaluation, GenerateJob, TrainJob
from trainer.records import STEPS, VALIDATION
from trainer.requests import (
    Likelihood,
    LogLikelihood,
    has_answers,
    identify_answers,
    read_requests,
    requests_path,
    write_answers,
)

BATCH = 4
# What ranks "measure": validation losses of sources a and b, with 300 and 100 validation tokens, by arm and seed.
LOSSES = {
    "base": {0: (5.0, 3.0), 1: (5.2, 3.4), 2: (5.1, 3.2)},
    "loss": {0: (4.0, 2.0), 1: (4.2, 2.4), 2: (4.1, 2.8)},
    "random": {0: (4.1, 1.9), 1: (4.4, 2.2), 2: (4.2, 2.8)},
    "all": {0: (4.1, 2.0), 1: (4.3, 2.2), 2: (4.2, 2.7)},
}
INITS = {"init-constant": {0: (4.3, 2.5), 1: (4.5, 2.7)}, "init-gpt2": {0: (4.1, 2.3), 1: (4.3, 2.5)}}
OTHER = (4.5, 2.5)


def of_arm(job: TrainJob, run: str) -> tuple[float, float]:
    """Return the losses of sources a and b that the arm and seed in a run's name stand for."""
    arm, _, seed = run.rpartition("-seed-")
    return {**LOSSES, **INITS}.get(arm, {}).get(int(seed), OTHER) if arm else OTHER


class FakeRanks:
    """Writes what ranks would have left, and remembers what it was asked for; fails at the job called `fails_at`.

    `losses` says what they measure; every job goes on for `seconds`, telling how far it is. To evaluation, the shortest
    continuation is the likeliest, but the longest in runs whose names start with `prefers_long`.
    """

    def __init__(self) -> None:
        self.jobs: list[str] = []
        self.asked: list[str] = []
        self.fails_at = ""
        self.losses: Callable[[TrainJob, str], tuple[float, float]] = of_arm
        self.seconds = 0.0
        self.prefers_long: tuple[str, ...] = ()

    def __call__(self, job: Job, run_folder: Path, name: str, progress: Progress, *_: Any) -> None:
        self.jobs.append(f"{run_folder.name} {name}")
        if self.jobs[-1] == self.fails_at:
            raise ValueError("killed")
        deadline = time.monotonic() + self.seconds
        while time.monotonic() < deadline:
            progress("training (steps)", 1, 2)
            time.sleep(0.01)
        corpus = Corpus(job.corpus)
        if isinstance(job, TrainJob):
            num_steps = train(job, corpus, self.losses(job, run_folder.name))
            if job.evaluate is not None:
                for step in range(job.evaluate.every_steps, num_steps, job.evaluate.every_steps):
                    answer(job.evaluate, job.evaluate.answers / f"step-{step:08d}", fingerprint(job.fingerprint, step))
        elif isinstance(job, GenerateJob):
            speed = {"fingerprint": job.fingerprint, "tokens_per_second": 1000 / job.model.num_layers}
            write_json(job.round_folder / "generation.json", speed)
        elif isinstance(job, EvaluateJob):
            sign = 1 if run_folder.name.startswith(self.prefers_long) else -1
            self.asked += answer(job.evaluation, job.answers, job.fingerprint, sign)
        elif isinstance(job, AblationJob):
            write_ablation(job.result, job.model.num_layers, job.longest_block, job.fingerprint)
        else:
            for shard in range(corpus.num_shards):
                lengths = corpus.lengths(shard)
                losses = np.arange(len(lengths), dtype=np.float32)
                path = losses_path(job.round_folder, shard)
                write_losses(path, corpus, shard, lengths, losses, job.fingerprint, job.origin)


def answer(evaluation: Evaluation, folder: Path, model: str, sign: int = -1) -> list[str]:
    """Leave answers to all tasks that have none, and return these. The log-likelihood is `sign` times the length."""
    answered = []
    for task in evaluation.tasks:
        requests = requests_path(evaluation.requests, task)
        identity = identify_answers(model, requests)
        if not has_answers(requests_path(folder, task), identity):
            answers = [
                LogLikelihood(float(sign * len(request.continuation)), False) if isinstance(request, Likelihood) else []
                for request in read_requests(requests)
            ]
            write_answers(requests_path(folder, task), answers, identity)
            answered.append(task)
    return answered


def train(job: TrainJob, corpus: Corpus, measured: tuple[float, float]) -> int:
    """Leave what training a round does, and return its steps."""
    mix = Mix(job.round_folder / "mix.parquet")
    lengths = corpus.read(*mix.read(0, len(mix))).num_tokens
    batch_size = job.train.global_batch_size
    steps = [
        {
            "step": number + 1,
            "loss": 5.0 - number / 100,
            "num_tokens": int(batch.sum()),
            "num_samples": len(batch),
            "tokens_per_second": 100.0,
        }
        for number, batch in enumerate(np.split(lengths, range(batch_size, len(lengths), batch_size)))
    ]
    write_parquet(job.round_folder / "steps.parquet", pa.Table.from_pylist(steps, STEPS), "")
    validation = [
        {"step": step, "source": source, "loss": loss + len(steps) - step, "num_tokens": num_tokens}
        for source, loss, num_tokens in zip("ab", measured, (300, 100), strict=True)
        for step in sorted({1, len(steps)})
    ]
    write_parquet(job.round_folder / "validation.parquet", pa.Table.from_pylist(validation, VALIDATION), "")
    write_json(job.round_folder / "checkpoint" / f"step-{len(steps):08d}" / "reprise.json", {"step": len(steps)})
    return len(steps)


def write_ablation(path: Path, num_layers: int, longest: int, fingerprint: str = "", seed: int = 0) -> None:
    """Write what skipping layers costs: random increases, at times negative, of a loss of 5."""
    generator = np.random.default_rng(seed)
    blocks = [(start, n) for n in range(1, min(longest, num_layers) + 1) for start in range(num_layers - n + 1)]
    increases = [0.0, *generator.normal([length / 2 for _, length in blocks], 0.5).tolist()]
    rows = [
        {"start": start, "length": length, "loss": 5 + increase, "increase": increase, "stderr": 0.01 * length}
        for (start, length), increase in zip([(0, 0), *blocks], increases, strict=True)
    ]
    write_parquet(path, pa.Table.from_pylist(rows), fingerprint)


def values(texts: Path, output: Path) -> dict[str, Any]:
    sources = [{"name": name, "path": str(texts / f"{name}.jsonl")} for name in ("a", "b")]
    corpus = {"sources": sources, "seq_length": 16, "num_shards": 2, "validation_fraction": 0.2}
    return {
        "name": "x", "output": str(output), "device": "cpu", "corpus": corpus, "tokenizer": {"vocab_size": 280},
        "model": {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "ffn_hidden_size": 16},
        "train": {"global_batch_size": BATCH, "micro_batch_size": 2},
    }  # fmt: skip


def write_texts(folder: Path) -> Path:
    """Write the sources a and b into `folder` and return it."""
    for name, seed in (("a", 1), ("b", 2)):
        lines = [json.dumps({"text": document}) for document in make_documents(40, seed)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def fake_ranks(monkeypatch: pytest.MonkeyPatch) -> FakeRanks:
    """Return what takes the place of real ranks."""
    fake = FakeRanks()
    monkeypatch.setattr(launcher, "launch", fake)
    return fake


def make_tokenizer(path: Path, vocab_size: int) -> None:
    """Write a tokenizer of so many entries, of words that nobody says."""
    words = {f"w{number}": number for number in range(vocab_size - 1)}
    vocabulary = {**words, "<|endoftext|>": vocab_size - 1}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "w0")).save(str(path))
