"""Every job on simulated NPUs, or on the CPU, under some layout, and its output."""

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from torch.distributed import TCPStore

from benchmarks.plain_model import read_checkpoint
from data_scoring.base.files import read_json
from data_scoring.config import LossKernel, ScoreConfig
from data_scoring.corpus.corpus import Corpus
from data_scoring.refine.training_mix import write_mix
from tests.conftest import ORIGIN, TINY_MODEL, TINY_TRAIN
from trainer.config import CheckpointConfig
from trainer.job import Job, write_job
from trainer.jobs import (
    AblationJob,
    CalibrateJob,
    EvaluateJob,
    Evaluation,
    GenerateJob,
    MaskJob,
    ScoreJob,
    TaylorJob,
    TrainJob,
)
from trainer.parallel_config import ParallelConfig
from trainer.requests import Generation, Likelihood, LogLikelihood, read_answers, requests_path, write_requests

STEPS, STOPPED_AT = 6, 3
STUDENT = TINY_MODEL.model_copy(
    update={"hidden_size": 16, "num_attention_heads": 2, "num_query_groups": 1, "head_size": 8, "ffn_hidden_size": 32}
)
# Tokens before and after, and what is generated after how many; the model reads 32.
_LIKELIHOODS = ((5, 3), (5, 1), (9, 7), (2, 4))
_GENERATIONS = ((4, 9), (11, 6))
_SECONDS = 600
Numbers = dict[str, np.ndarray]


class Layout(NamedTuple):
    """Where jobs run: so many tensor x pipeline x data ranks of a kind of device; tensor ranks share the sequence."""

    device: str
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    precision: str = "float32"

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(tensor=self.tensor, pipeline=self.pipeline, data=self.data, sequence=self.tensor > 1)


class Task(NamedTuple):
    """A job, and the step in which it is asked to stop."""

    job: Job
    stop_at: int | None = None


@dataclass(frozen=True)
class Place:
    """Where jobs run, and what their ranks find there: the corpus, and variables of the environment."""

    corpus: Corpus
    folder: Path
    environment: dict[str, str]

    def start(self, layout: Layout) -> Path:
        """Train a model in `folder`, and return the checkpoint that it ends with."""
        common, round_folder = self._common(layout), self._make_round("trained")
        job = self._train(common, round_folder, "never", start_from=None)
        self._do(layout, [Task(job)])
        return round_folder / "checkpoint" / f"step-{STEPS:08d}"

    def run(self, layout: Layout, weights: Path) -> None:
        """Do every job in `folder`, beginning with the model of the checkpoint `weights`.

        One round trains to its end, saving asynchronously. Another is asked to stop, saves while it waits, and goes on.
        """
        common = self._common(layout)
        # Sharing the vocabulary's rows is what kernels have to exchange something for.
        kernel: LossKernel = "chunked" if layout.tensor > 1 else "reference"
        trained = self._train(common, self._make_round("trained"), "always", weights, kernel)
        stopped = self._train(common, self._make_round("stopped"), "never", weights, kernel)
        uses = [Task(job) for job in self._uses(common, weights)]
        self._do(layout, [Task(trained), Task(stopped, STOPPED_AT), Task(stopped), *uses])

    def _common(self, layout: Layout) -> dict[str, Any]:
        self.folder.mkdir()
        (self.folder / "errors").mkdir()
        return {
            "corpus": self.corpus.folder,
            "model": TINY_MODEL,
            "parallel": layout.parallel,
            "device": layout.device,
            "precision": layout.precision,
            "activation_kernel": "reference",
            "seed": 1,
            "fingerprint": "f",
            "progress": self.folder / "progress.json",
            "errors": self.folder / "errors",
            "lock": self.folder / "lock",
        }

    def _make_round(self, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir()
        samples = f"select shard, sample from '{self.corpus.samples_path}' where shard >= 0"
        num_samples = STEPS * TINY_TRAIN.global_batch_size
        write_mix(folder / "mix.parquet", f"{samples} order by hash(shard, sample) limit {num_samples}", 0, 1)
        return folder

    def _train(
        self,
        common: dict[str, Any],
        folder: Path,
        asynchronous: Any,
        start_from: Path | None,
        loss_kernel: LossKernel = "reference",
    ) -> TrainJob:
        return TrainJob(
            **common,
            round_folder=folder,
            train=TINY_TRAIN.model_copy(update={"loss_kernel": loss_kernel}),
            checkpoint=CheckpointConfig(every_steps=2, asynchronous=asynchronous),
            score=ScoreConfig(),
            start_from=start_from,
        )

    def _uses(self, common: dict[str, Any], weights: Path) -> list[Job]:
        common = {**common, "round_folder": self.folder, "weights": weights}
        score, sized = ScoreConfig(micro_batch_size=4), {"num_samples": 24, "micro_batch_size": 4}
        calibration = score.model_copy(update={"calibration_samples": 24})
        evaluation = Evaluation(requests=self._write_requests(), tasks=("some",))
        return [
            ScoreJob(**common, score=score, origin=ORIGIN),
            CalibrateJob(**common, score=calibration, origin=ORIGIN, round_number=1),
            EvaluateJob(**common, evaluation=evaluation, answers=self.folder / "answers", loss_kernel="chunked"),
            GenerateJob(**common, batch_size=3, num_new_tokens=20),
            AblationJob(**common, **sized),
            TaylorJob(**common, **sized),
            MaskJob(**common, student=STUDENT, **sized, steps=5, batch_size=8),
        ]

    def _write_requests(self) -> Path:
        generator = np.random.default_rng(0)

        def draw(length: int) -> Any:
            return generator.integers(0, self.corpus.vocab_size, length, np.int32)

        likelihoods = [Likelihood(draw(context), draw(continuation)) for context, continuation in _LIKELIHOODS]
        generations = [Generation(draw(prompt), new) for prompt, new in _GENERATIONS]
        folder = self.folder / "requests"
        folder.mkdir()
        write_requests(requests_path(folder, "some"), [*likelihoods, *generations])
        return folder

    def _do(self, layout: Layout, tasks: list[Task]) -> None:
        """Do `tasks` on the ranks of a layout. Raises RuntimeError, with what a rank says, where one fails."""
        jobs, world_size = self.folder / "jobs.json", layout.parallel.world_size
        # This process keeps the stores in which ranks meet, as torchrun does.
        stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in tasks]
        content = []
        for number, (task, store) in enumerate(zip(tasks, stores, strict=True)):
            path = self.folder / f"{number}.job.json"
            write_job(task.job, path)
            content.append((str(path), task.stop_at, store.port))
        jobs.write_text(json.dumps(content))
        environment = {
            **os.environ, **self.environment, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
            "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
        }  # fmt: skip
        logs = [self.folder / f"rank-{rank}.log" for rank in range(world_size)]
        with ExitStack() as stack:
            started = []
            for rank, log in enumerate(logs):
                process = subprocess.Popen(
                    [sys.executable, "-W", "ignore", "-m", "tests.rehearsal.npu_rank", str(jobs)],
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=stack.enter_context(log.open("wb")),
                    stderr=subprocess.STDOUT,
                )
                stack.callback(process.kill)
                started.append(process)
            codes = _wait(started)
        for rank, (code, log) in enumerate(zip(codes, logs, strict=True)):
            if code not in (0, None):
                raise RuntimeError(f"rank {rank} of {layout} ended with {code}:\n{log.read_text()[-6000:]}")


def _wait(processes: list[subprocess.Popen[bytes]]) -> list[int | None]:
    """Return the exit codes once all have ended, or one has failed, None being of those that still run."""
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if all(code == 0 for code in codes) or any(code not in (0, None) for code in codes):
            return codes
        time.sleep(0.2)
    raise TimeoutError(f"ranks do not end within {_SECONDS} seconds")


def read_results(folder: Path) -> dict[str, Numbers]:
    """Return what every job that ran in `folder` has found, as named arrays."""
    found = {name: _columns(folder / name / "steps.parquet", "loss", "grad_norm") for name in ("trained", "stopped")}
    for name in found:
        found[name] |= {"validation": _columns(folder / name / "validation.parquet", "loss")["loss"]}
    losses = [_columns(path, "loss")["loss"] for path in sorted((folder / "losses").glob("*.parquet"))]
    calibration = pq.read_table(folder / "calibration.parquet")
    prefixes = [name for name in calibration.column_names if name == "loss" or name.startswith("prefix:")]
    answers = read_answers(folder / "answers" / "some.parquet")
    likely = [answer for answer in answers if isinstance(answer, LogLikelihood)]
    found |= {
        "score": {"loss": np.concatenate(losses)},
        "calibrate": _columns(folder / "calibration.parquet", *prefixes),
        "evaluate": {
            "log-likelihoods": np.array([answer.log_likelihood for answer in likely]),
            "tokens": np.array(
                [token for answer in answers if not isinstance(answer, LogLikelihood) for token in answer]
            ),
        },
        "skip": _columns(folder / "skips.parquet", "loss", "increase"),
        "taylor": {
            name: tensor.float().numpy()
            for name, tensor in read_checkpoint(folder / "taylor" / "step-00000000").items()
        },
        "masks": {"losses": np.array(read_json(folder / "masks.json")["losses"])},
    }
    return found


def _columns(path: Path, *names: str) -> Numbers:
    table = pq.read_table(path)
    return {name: table[name].to_numpy() for name in names}
