"""The rehearsed jobs: training in several layouts, a large model, and all other work with weights."""

import json
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from data_scoring.base.progress import silent
from data_scoring.config import CorpusConfig, ScoreConfig, SourceConfig, TokenizerConfig
from data_scoring.corpus.corpus import Corpus
from data_scoring.corpus.prepare_corpus import prepare_corpus
from data_scoring.refine.training_mix import write_mix
from tests.conftest import ORIGIN, TINY_MODEL, make_documents
from tests.rehearsal.flaws import FLAWS
from tests.rehearsal.plan import Rehearsal
from trainer.config import CheckpointConfig, ModelConfig, TrainConfig
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
from trainer.requests import Generation, Likelihood, requests_path, write_requests

PRESET, SEQ_LENGTH = "pangu-pi-1b-pro", 2048
STEPS = 2
REFERENCE = {"loss_kernel": "reference", "activation_kernel": "reference"}
TRAIN = TrainConfig(global_batch_size=4, micro_batch_size=2, validate_every_steps=1000, **REFERENCE)
LAYOUTS = {
    "one": ParallelConfig(),
    "tensor": ParallelConfig(tensor=2, sequence=True),
    "pipeline": ParallelConfig(pipeline=2),
    "all": ParallelConfig(tensor=2, pipeline=2, data=2),
    "interleaved": ParallelConfig(pipeline=2, virtual_pipeline=2),
}
# What the last of them divides.
DEEP_MODEL = TINY_MODEL.model_copy(update={"num_layers": 4})
# The large model's rehearsals by name: micro batch size and kernels.
LARGE = {
    "large 2": (2, REFERENCE),
    "large 8": (8, REFERENCE),
    "large 8 portable": (8, {"loss_kernel": "chunked", "activation_kernel": "recompute"}),
    "large 8 triton": (8, {"loss_kernel": "triton", "activation_kernel": "triton"}),
}
# Names of the rehearsals of training: the layout and the rank, or the large model.
TRAINED = (
    *("one", "tensor 0", "tensor 1", "pipeline 0", "pipeline 1", "all 0", "all 7", "interleaved 0", "interleaved 1"),
    *LARGE,
)
_STUDENT = TINY_MODEL.model_copy(
    update={"hidden_size": 16, "num_attention_heads": 2, "num_query_groups": 1, "head_size": 8, "ffn_hidden_size": 32}
)


class CudaJobs:
    """A plan of rehearsals in a folder, where their jobs leave what they do."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._plan: dict[str, Rehearsal] = {}

    def write(self, only: Collection[str] | None = None) -> Path:
        """Plan the rehearsals with the names `only`, or all, and return the path of the plan."""
        short, long = self._corpus(32, 40), self._corpus(SEQ_LENGTH, 60)
        round_of_one = self._train("one", short, TINY_MODEL, TRAIN, steps=2 * STEPS)
        self._add("one", round_of_one, stop_after=STEPS)
        for layout, parallel in LAYOUTS.items():
            # The first and the last rank: of stages, those with the embedding and with the head.
            for rank in (0, parallel.world_size - 1) if parallel.world_size > 1 else ():
                name = f"{layout} {rank}"
                model = DEEP_MODEL if parallel.virtual_pipeline > 1 else TINY_MODEL
                job = self._train(name, short, model, TRAIN, parallel)
                self._add(name, job, rank=rank, world_size=parallel.world_size, checkpoint="planned")
        for name, (size, kernels) in LARGE.items():
            train = TrainConfig(global_batch_size=size, micro_batch_size=size, validate_every_steps=1000, **kernels)
            is_stopped = name != "large 2"
            options: dict[str, Any] = (
                {"checkpoint": "none", "stop_after": STEPS} if is_stopped else {"checkpoint": "planned"}
            )
            job = self._train(name, long, ModelConfig(preset=PRESET), train, steps=STEPS + is_stopped)
            self._add(name, job, has_host_data=False, **options)
        for flaw in FLAWS:
            job = self._train(flaw, short, TINY_MODEL, TRAIN, steps=STEPS + 1)
            self._add(flaw, job, checkpoint="none", stop_after=STEPS, flaw=flaw)
        self._add_uses(short)
        # It removes what it went on from.
        self._add("resumed", round_of_one)
        path = self._folder / "plan.json"
        planned = [asdict(each) for name, each in self._plan.items() if only is None or name in only]
        path.write_text(json.dumps(planned), encoding="utf-8")
        return path

    def read(self) -> dict[str, dict[str, Any]]:
        """Return, by the rehearsal's name, what is known of each: parts and error."""
        return {
            name: json.loads(path.read_text(encoding="utf-8"))
            for name, each in self._plan.items()
            if (path := Path(each.result)).exists()
        }

    def _add_uses(self, corpus: Corpus) -> None:
        """Plan what is done with the weights that the round "one" leaves where it stops."""
        weights = self._folder / "one/checkpoint" / f"step-{STEPS:08d}"

        def common(name: str) -> dict[str, Any]:
            return {**self._common(name, corpus, TINY_MODEL, ParallelConfig()), "weights": weights}

        score = ScoreConfig(micro_batch_size=4, calibration_samples=10)
        requests = self._folder / "requests"
        write_requests(requests_path(requests, "asked"), _make_requests(corpus.vocab_size))
        evaluation = Evaluation(requests=requests, tasks=("asked",))
        answers = self._folder / "evaluate/answers"
        few = {"num_samples": 8, "micro_batch_size": 4}
        for job in (
            ScoreJob(**common("score"), score=score, origin=ORIGIN),
            CalibrateJob(**common("calibrate"), score=score, origin=ORIGIN, round_number=1),
            EvaluateJob(**common("evaluate"), evaluation=evaluation, answers=answers, loss_kernel="chunked"),
            GenerateJob(**common("generate"), batch_size=3, num_new_tokens=4),
            AblationJob(**common("skip"), **few),
            TaylorJob(**common("taylor"), **few),
            MaskJob(**common("masks"), student=_STUDENT, steps=2, batch_size=4, **few),
        ):
            self._add(job.round_folder.name, job)

    def _add(self, name: str, job: Job, **options: Any) -> None:
        path = self._folder / f"{name}.job.json"
        write_job(job, path)
        self._plan[name] = Rehearsal(str(path), str(self._folder / f"{name}.json"), **options)

    def _common(self, name: str, corpus: Corpus, model: ModelConfig, parallel: ParallelConfig) -> dict[str, Any]:
        folder = self._folder / name
        (folder / "errors").mkdir(parents=True, exist_ok=True)
        return {
            "corpus": corpus.folder,
            "round_folder": folder,
            "model": model,
            "parallel": parallel,
            "device": "cuda",
            "precision": "auto",
            "activation_kernel": "reference",
            "seed": 1,
            "fingerprint": "f",
            "progress": folder / "progress.json",
            "errors": folder / "errors",
            "lock": folder / ".lock",
        }

    def _train(
        self,
        name: str,
        corpus: Corpus,
        model: ModelConfig,
        train: TrainConfig,
        parallel: ParallelConfig = LAYOUTS["one"],
        steps: int = STEPS,
    ) -> TrainJob:
        common = {
            **self._common(name, corpus, model, parallel),
            "activation_kernel": train.activation_kernel,
        }
        wanted = steps * train.global_batch_size
        samples = f"select shard, sample from '{corpus.samples_path}', range({wanted}) where shard >= 0 limit {wanted}"
        write_mix(common["round_folder"] / "mix.parquet", samples, 0, 1)
        return TrainJob(
            **common,
            train=train.resolve(corpus.seq_length),
            checkpoint=CheckpointConfig(),
            score=ScoreConfig(micro_batch_size=2),
            start_from=None,
        )

    def _corpus(self, seq_length: int, num_documents: int) -> Corpus:
        text, folder = self._folder / f"text-{seq_length}", self._folder / f"corpus-{seq_length}"
        text.mkdir()
        for number, document in enumerate(make_documents(num_documents, 1)):
            (text / f"{number:03d}.txt").write_text(document, encoding="utf-8")
        source = SourceConfig(name="one", path=str(text))
        config = CorpusConfig(sources=(source,), seq_length=seq_length, num_shards=2, validation_fraction=0.05)
        prepare_corpus(config, TokenizerConfig(vocab_size=300), 0, folder, "rehearsal", silent)
        return Corpus(folder)


def _make_requests(vocab_size: int) -> list[Likelihood | Generation]:
    """Return likelihoods that share their beginning, and prompts of different lengths."""
    draw = np.random.default_rng(1).integers(1, vocab_size, 12).astype(np.int32)
    return [
        *(Likelihood(draw[:6], draw[6 : 7 + number]) for number in range(3)),
        *(Generation(draw[:length], 3) for length in (2, 5)),
    ]
