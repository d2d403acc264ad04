"""Output of jobs in bfloat16, under every layout of two ranks and on one rank, in the launch of `two_ranks`.

Ranks run complete jobs here, as workers do; the tests check the files that they write.
"""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.plain_model import PlainModel, load_megatron_weights, read_checkpoint, stacked_weights
from data_scoring.config import ScoreConfig
from data_scoring.corpus.corpus import Corpus
from data_scoring.refine.training_mix import write_mix
from tests.conftest import ORIGIN, TINY_MODEL, TINY_TRAIN, Ranks
from tests.trainer import two_ranks_layers
from tests.trainer.rendezvous import meet
from tests.trainer.test_pruning import random_plan
from tests.trainer.two_ranks_evaluation import make_requests
from trainer.checkpoint_folder import list_checkpoints
from trainer.config import CheckpointConfig, ModelConfig
from trainer.devices import Device
from trainer.job import Job
from trainer.jobs import (
    AblationJob,
    CalibrateJob,
    EvaluateJob,
    Evaluation,
    GenerateJob,
    RepeatedEvaluation,
    ScoreJob,
    TrainJob,
)
from trainer.parallel_config import ParallelConfig
from trainer.pruning import slice_checkpoint
from trainer.requests import requests_path, write_requests
from trainer.stopping import StoppedError, StopRequest
from trainer.vocabulary_rows import cut_checkpoint
from trainer.weights import write_weights

LAYOUTS = two_ranks_layers.LAYOUTS
# Five batches of eight and one of three.
NUM_SAMPLES, NUM_STEPS, STOP_AT = 43, 6, 3
# Where training that was stopped goes on: where it was, and elsewhere.
MOVES = {"tensor": "data", "pipeline": "sequence", "data": "pipeline"}
# A part of the trained model, whose layers all stay.
STUDENT = TINY_MODEL.model_copy(
    update={"hidden_size": 16, "num_attention_heads": 2, "num_query_groups": 1, "head_size": 8, "ffn_hidden_size": 32}
)
ROUNDED, CUT, SLICED = (Path(name) / "step-00000000" for name in ("rounded", "cut", "sliced"))
# Beyond 256, whole numbers have no bfloat16 each.
LONG = 1024
KEPT_TOKENS = tuple(range(0, 280, 2))
ONCE = CheckpointConfig(keep_last=100, asynchronous="never")
WAITING = ONCE.model_copy(update={"every_steps": 2})
IN_BACKGROUND = WAITING.model_copy(update={"asynchronous": "always"})


def prepare(corpus: Corpus, trained: Path, folder: Path) -> None:
    """Write what all jobs begin with, on one rank alone: a mix, requests, and the trained model in bfloat16."""
    samples = f"select shard, sample from '{corpus.samples_path}' where sample < 15 limit {NUM_SAMPLES}"
    write_mix(folder / "mix.parquet", samples, 0, 1)
    requests = make_requests(0, corpus.vocab_size, corpus.seq_length)
    write_requests(requests_path(folder / "requests", "some"), requests)
    # Whatever the precision of who reads it, these are the model's weights to the last bit.
    tensors = {name: tensor.bfloat16() for name, tensor in read_checkpoint(trained).items()}
    write_weights(
        folder / ROUNDED,
        {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()},
        lambda name, layer: tensors[name] if layer is None else tensors[name][layer],
        {"step": 0, "vocab_size": corpus.vocab_size, "fingerprint": ""},
    )
    part = random_plan(TINY_MODEL, STUDENT, range(TINY_MODEL.num_layers), seed=7)
    slice_checkpoint(folder / ROUNDED, TINY_MODEL, STUDENT, part, folder / SLICED)
    cut_checkpoint(folder / ROUNDED, KEPT_TOKENS, corpus.vocab_size, folder / CUT)


def do_together(device: Device, corpus: Corpus, trained: Path, folder: Path) -> None:
    """Do jobs on two ranks, in every layout that they have."""
    for name, parallel in LAYOUTS.items():
        jobs = Jobs(device, corpus, folder, name, parallel)
        jobs.use(is_everything=name == "pipeline")
        jobs.train("train", trained, evaluates=True)
    for name, other in MOVES.items():
        first = Jobs(device, corpus, folder, name, LAYOUTS[name])
        first.train("stopped", trained, stop_at=STOP_AT)
        second = Jobs(device, corpus, folder, other, LAYOUTS[other])
        second.go_on(first.place("stopped"), f"moved-from-{name}", trained)
        if name == "tensor":
            first.go_on(first.place("stopped"), "resumed", trained)


def do_alone(device: Device, corpus: Corpus, trained: Path, folder: Path, rank: int) -> None:
    """Do jobs on one rank, while the other one does other jobs on its own; long.pt has losses of long sequences."""
    meet((rank,))
    jobs = Jobs(device, corpus, folder, "one", ParallelConfig(), (rank,))
    if rank == 0:
        jobs.train("train", trained, evaluates=True)
        jobs.train("round-2", list_checkpoints(jobs.place("train") / "checkpoint")[-1])
        jobs.train("stopped", trained, IN_BACKGROUND, stop_at=STOP_AT)
        jobs.go_on(jobs.place("stopped"), "resumed", trained)
        return
    torch.save(long_losses(device), folder / "long.pt")
    jobs.use(is_everything=True)
    jobs.score("student", folder / SLICED, STUDENT)
    for name, checkpoint in (("waiting", WAITING), ("background", IN_BACKGROUND)):
        jobs.train(name, trained, checkpoint, stop_at=5)


def long_losses(device: Device) -> dict[str, torch.Tensor]:
    """Return token losses, [2, 1024], in bfloat16, and in plain torch with the same weights in float32."""
    from megatron.core import parallel_state

    from trainer.model import Kernels, build_model

    parallel_state.initialize_model_parallel()
    device.seed(5)
    place = torch.get_default_device()
    [half] = build_model(TINY_MODEL, 256, LONG, ParallelConfig(), place, True, Kernels()).eval()
    generator = torch.Generator().manual_seed(2)
    plain = PlainModel(TINY_MODEL, 256)
    tokens = torch.randint(0, 256, (2, LONG + 1), generator=generator)
    inputs, labels = tokens[:, :-1], tokens[:, 1:].contiguous()
    with torch.no_grad():
        # Far enough from their start for what is attended to to matter.
        for parameter in half.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
        load_megatron_weights(plain, stacked_weights(half.module, TINY_MODEL.num_layers))
        positions = torch.arange(LONG).expand(2, -1)
        losses = half(input_ids=inputs, position_ids=positions, attention_mask=None, labels=labels)
        return {"found": losses, "expected": plain(inputs, labels)}


class Jobs:
    """Jobs in bfloat16 of the ranks of a process group, in one layout of theirs."""

    def __init__(
        self,
        device: Device,
        corpus: Corpus,
        folder: Path,
        layout: str,
        parallel: ParallelConfig,
        ranks: tuple[int, ...] = (0, 1),
    ) -> None:
        self.device, self.corpus, self.folder = device, corpus, folder
        self.layout, self.parallel, self.ranks = layout, parallel, ranks

    def place(self, name: str) -> Path:
        return self.folder / f"{name}-{self.layout}"

    def common(self, name: str, model: ModelConfig = TINY_MODEL) -> dict[str, Any]:
        common = Ranks(self.corpus, self.folder)._common(self.place(name), (1, 1, 1), model)
        # Ranks that work alone, at the same time, must not write one file.
        progress = self.place(name).with_suffix(".progress.json")
        return {**common, "parallel": self.parallel, "precision": "bfloat16", "progress": progress}

    def score(self, name: str, weights: Path, model: ModelConfig = TINY_MODEL) -> None:
        score = ScoreConfig(micro_batch_size=16)
        self.do(ScoreJob(**self.common(name, model), score=score, weights=weights, origin=ORIGIN))

    def use(self, is_everything: bool) -> None:
        """Do the jobs that a trained model is used for; those that go other ways under every layout, or everything."""
        weights = self.folder / ROUNDED
        self.score("score", weights)
        self.answer("evaluate", longest_block=None)
        self.do(GenerateJob(**self.common("generate"), weights=weights, batch_size=3, num_new_tokens=30))
        self.do(AblationJob(**self.common("skip"), weights=weights, num_samples=50, micro_batch_size=16))
        if is_everything:
            self.answer("blocks", longest_block=1)
            score = ScoreConfig(micro_batch_size=16, calibration_samples=10_000)
            common = {**self.common("calibrate"), "score": score, "weights": weights}
            self.do(CalibrateJob(**common, origin=ORIGIN, round_number=1))

    def answer(self, name: str, longest_block: int | None) -> None:
        evaluation = Evaluation(requests=self.folder / "requests", tasks=("some",))
        common = {**self.common(name), "weights": self.folder / ROUNDED, "evaluation": evaluation}
        answers = self.place(name) / "answers"
        self.do(EvaluateJob(**common, answers=answers, loss_kernel="chunked", longest_block=longest_block))

    def train(
        self,
        name: str,
        start_from: Path,
        checkpoint: CheckpointConfig = ONCE,
        stop_at: int | None = None,
        evaluates: bool = False,
    ) -> None:
        """Train in the place `name`, or go on there; `stop_at`: the step in which it is asked to stop."""
        from trainer import train

        place, stop, steps = self.place(name), StopRequest(), 0
        run_schedule = train.run_schedule

        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal steps
            steps += 1
            stop.is_made = steps == stop_at
            return run_schedule(*arguments, **options)

        if torch.distributed.get_rank() == 0 and not place.exists():
            place.mkdir()
            shutil.copy(self.folder / "mix.parquet", place)
        torch.distributed.barrier()
        evaluate = RepeatedEvaluation(
            requests=self.folder / "requests", tasks=("some",), answers=place / "answers", every_steps=3
        )
        job = TrainJob(
            **self.common(name), train=TINY_TRAIN, checkpoint=checkpoint, score=ScoreConfig(), start_from=start_from,
            evaluate=evaluate if evaluates else None,
        )  # fmt: skip
        train.run_schedule = run
        with suppress(StoppedError):
            self.do(job, stop)
        train.run_schedule = run_schedule
        torch.distributed.barrier()

    def go_on(self, stopped: Path, name: str, start_from: Path) -> None:
        """Go on, in the place `name`, with training that was stopped elsewhere."""
        if torch.distributed.get_rank() == 0:
            shutil.copytree(stopped, self.place(name))
        torch.distributed.barrier()
        self.train(name, start_from)

    def do(self, job: Job, stop: StopRequest | None = None) -> None:
        from trainer.rank import do

        if torch.distributed.get_rank() == 0:
            job.round_folder.mkdir(exist_ok=True)
        torch.distributed.barrier()
        meet(self.ranks)
        do(job, self.device, stop or StopRequest())
        torch.distributed.barrier()
