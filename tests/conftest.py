"""What tests share: a tiny corpus, and jobs run on real ranks."""

import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from data_scoring.base.progress import silent
from data_scoring.config import CorpusConfig, ScoreConfig, SourceConfig, TokenizerConfig
from data_scoring.corpus.corpus import Corpus
from data_scoring.corpus.prepare_corpus import prepare_corpus
from data_scoring.losses.origin import Origin
from data_scoring.refine.refine_shards import mix_all
from flows.launch.launcher import launch
from tests.forked_ranks import forking
from trainer.checkpoint_folder import list_checkpoints
from trainer.config import CheckpointConfig, ModelConfig, TrainConfig
from trainer.job import Job
from trainer.jobs import AblationJob, CalibrateJob, GenerateJob, ScoreJob, TrainJob
from trainer.parallel_config import ParallelConfig

# Threads that wait leave their core to the other processes of the tests.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

TINY_MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=64,
    activation_terms=3,
    shortcut_reduction=4,
)
TINY_TRAIN = TrainConfig(global_batch_size=8, micro_batch_size=2, lr=1e-2, min_lr=1e-3, validate_every_steps=1000)

TINY_CHECKPOINT = CheckpointConfig()
ORIGIN = Origin(checkpoint="step", tokenizer="t", corpus="c", precision="float32", budget="full")

WORDS = (
    "the",
    "a",
    "model",
    "learns",
    "what",
    "text",
    "says",
    "and",
    "where",
    "it",
    "goes",
    "on",
    "until",
    "loss",
    "falls",
)


def make_documents(count: int, seed: int = 0) -> list[str]:
    """Return `count` distinct documents of random words."""
    generator = random.Random(seed)
    return [f"{number}: " + " ".join(generator.choices(WORDS, k=generator.randint(20, 60))) for number in range(count)]


MakeOnce = Callable[[str, Callable[[Path], None]], Path]


# Files that take longest, in seconds on two cores: 150 down to 30.
_LONGEST = (
    "cluster/test_steps_on_ray.py",
    "trainer/test_bfloat16.py",
    "launch/test_ray_launcher.py",
    "orchestration/test_pipeline.py",
    "cluster/test_engines.py",
    "cluster/test_run_on_ray.py",
    "rehearsal/test_cuda.py",
    "benchmarks/test_device.py",
    "stages/test_one_launch.py",
    "experiments/test_compare.py",
    "experiments/test_ladder.py",
    "orchestration/test_temporary_server.py",
    "rehearsal/test_npu.py",
    "trainer/test_kept_model.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=20, help="kills of tests/flows/cli/test_random_kills.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first: the processes of pytest-xdist then end together, and none waits for another's."""
    places = {name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get("/".join(item.path.parts[-2:]), len(places)))


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> MakeOnce:
    """Returns a folder by its name, which the first test that asks has made, of those in all processes."""
    base: Path = tmp_path_factory.getbasetemp()
    # Processes of pytest-xdist have folders of their own in a common one.
    common = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make(name: str, fill: Callable[[Path], None]) -> Path:
        folder, is_made = common / name, common / f"{name}.made"
        with FileLock(f"{folder}.lock"):
            if not is_made.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                is_made.touch()
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_corpus(make_once: MakeOnce) -> Corpus:
    """A corpus of two sources, 3 shards, samples of 32 tokens."""
    return Corpus(make_once("tiny", prepare_tiny_corpus) / "corpus")


def prepare_tiny_corpus(folder: Path) -> None:
    """Write texts into `folder`, and a corpus of them into its `corpus`."""
    sources = []
    for name, count, seed in (("one", 120, 1), ("two", 60, 2)):
        (folder / name).mkdir()
        for number, document in enumerate(make_documents(count, seed)):
            (folder / name / f"{number:03d}.txt").write_text(document)
        sources.append(SourceConfig(name=name, path=str(folder / name)))
    corpus = CorpusConfig(sources=tuple(sources), seq_length=32, num_shards=3, validation_fraction=0.1)
    prepare_corpus(corpus, TokenizerConfig(vocab_size=300), 0, folder / "corpus", "tiny", silent)


# Tensor-parallel ranks, pipeline stages, replicas, and the chunks of a stage, by default one.
Layout = tuple[int, int, int] | tuple[int, int, int, int]


class Ranks:
    """Runs jobs over the tiny corpus on real ranks.

    starting: how the launcher starts them: as it does everywhere, under torchrun, or `forking`.
    """

    def __init__(
        self, corpus: Corpus, folder: Path, starting: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        self.corpus, self.folder, self._starting = corpus, folder, starting

    def _common(self, round_folder: Path, layout: Layout, model: ModelConfig) -> dict[str, Any]:
        tensor, pipeline, data, *chunks = layout
        # Ranks that share layers and stages share the sequence as well: most layouts have it off, one has it on.
        parallel = ParallelConfig(
            tensor=tensor,
            pipeline=pipeline,
            virtual_pipeline=chunks[0] if chunks else 1,
            data=data,
            sequence=tensor > 1 and pipeline > 1,
        )
        return {
            "corpus": self.corpus.folder,
            "round_folder": round_folder,
            "model": model,
            "parallel": parallel,
            "device": "cpu",
            "precision": "float32",
            "activation_kernel": "reference",
            "seed": 1,
            "fingerprint": "f",
            "progress": self.folder / "progress.json",
            "errors": self.folder / "errors",
            "lock": self.folder / ".ranks.lock",
        }

    def train(
        self,
        name: str,
        layout: Layout = (1, 1, 1),
        start_from: Path | None = None,
        make_mix: Callable[[Path], int] | None = None,
        checkpoint: CheckpointConfig = TINY_CHECKPOINT,
        train: TrainConfig = TINY_TRAIN,
        model: ModelConfig = TINY_MODEL,
        keeps_optimizer: bool = False,
    ) -> Path:
        """Train a round in the folder `name`, or go on with it, and return the folder."""
        folder = self.folder / name
        if not (folder / "mix.parquet").exists():
            if make_mix is None:
                mix_all(folder / "mix.parquet", self.corpus.samples_path, 0)
            else:
                make_mix(folder / "mix.parquet")
        job = self.job(name, layout, start_from, checkpoint, train, model)
        self.launch(job.model_copy(update={"keeps_optimizer": keeps_optimizer}), name)
        return folder

    def job(
        self,
        name: str,
        layout: Layout = (1, 1, 1),
        start_from: Path | None = None,
        checkpoint: CheckpointConfig = TINY_CHECKPOINT,
        train: TrainConfig = TINY_TRAIN,
        model: ModelConfig = TINY_MODEL,
    ) -> TrainJob:
        """Return the job of training a round in the folder `name`."""
        common = self._common(self.folder / name, layout, model)
        return TrainJob(**common, train=train, checkpoint=checkpoint, score=ScoreConfig(), start_from=start_from)

    def score(
        self,
        name: str,
        weights: Path,
        layout: Layout = (1, 1, 1),
        model: ModelConfig = TINY_MODEL,
    ) -> Path:
        """Score all shards into the folder `name` and return it."""
        folder = self.folder / name
        common = self._common(folder, layout, model)
        job = ScoreJob(**common, score=ScoreConfig(micro_batch_size=4), weights=weights, origin=ORIGIN)
        self.launch(job, f"score-{name}")
        return folder

    def calibrate(self, name: str, weights: Path, layout: Layout) -> Path:
        """Score all samples by every candidate prefix into the folder `name` and return it."""
        folder = self.folder / name
        folder.mkdir()
        common = self._common(folder, layout, TINY_MODEL)
        score = ScoreConfig(micro_batch_size=1, calibration_samples=10_000)
        job = CalibrateJob(**common, score=score, weights=weights, origin=ORIGIN, round_number=1)
        self.launch(job, f"calibrate-{name}")
        return folder

    def generate(self, name: str, weights: Path, layout: Layout, model: ModelConfig = TINY_MODEL) -> dict[str, Any]:
        """Generate 30 tokens for each of 3 random prompts and return what generation.json says."""
        folder = self.folder / name
        folder.mkdir()
        common = self._common(folder, layout, model)
        self.launch(GenerateJob(**common, weights=weights, batch_size=3, num_new_tokens=30), f"generate-{name}")
        return dict(json.loads((folder / "generation.json").read_text()))

    def skip(self, name: str, weights: Path, layout: Layout, model: ModelConfig) -> Path:
        """Measure what skipping layers costs, on 50 samples, and return the file that says so."""
        common = self._common(self.folder / name, layout, model)
        job = AblationJob(**common, weights=weights, num_samples=50, micro_batch_size=4)
        self.launch(job, name)
        return job.result

    def launch(self, job: Job, name: str) -> None:
        """Run `job` to its end."""
        with self._starting():
            launch(job, self.folder, name, silent)


@pytest.fixture(scope="module")
def ranks(tiny_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """Jobs over the tiny corpus, on ranks that are forked; rounds of one name are one round to a module."""
    return Ranks(tiny_corpus, tmp_path_factory.mktemp("ranks"), forking)


@pytest.fixture(scope="session")
def trained(tiny_corpus: Corpus, make_once: MakeOnce) -> Path:
    """The folder of a round trained on one rank."""

    def train(folder: Path) -> None:
        Ranks(tiny_corpus, folder, forking).train("trained")

    return make_once("trained", train) / "trained"


@pytest.fixture(scope="session")
def scored(tiny_corpus: Corpus, trained: Path, make_once: MakeOnce) -> Path:
    """The folder of the losses of all samples under the trained model, scored on one rank."""
    weights = list_checkpoints(trained / "checkpoint")[-1]

    def score(folder: Path) -> None:
        Ranks(tiny_corpus, folder, forking).score("scored", weights)

    return make_once("scored", score) / "scored"


@pytest.fixture(scope="session")
def hugging_face(tiny_corpus: Corpus, make_once: MakeOnce) -> Path:
    """The folder of models that transformers made, and Reprise's copies of them: see `make_models`."""
    from tests.hugging_face_models import make_models

    return make_once("hugging-face", lambda folder: make_models(folder, tiny_corpus.tokenizer_path))


def read_rows(pattern: Path, *columns: str) -> list[tuple[Any, ...]]:
    """Return the rows of the Parquet files under `pattern` (a file or a folder), sorted."""
    files = sorted(pattern.glob("*.parquet")) if pattern.is_dir() else [pattern]
    rows = [tuple(row[column] for column in columns) for file in files for row in pq.read_table(file).to_pylist()]
    return sorted(rows)
