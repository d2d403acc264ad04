"""The ranks that have trained a round score it with the model in memory, as ranks that load its checkpoint do."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from data_scoring.base.files import read_json
from data_scoring.base.progress import silent
from data_scoring.config import ScoreConfig
from data_scoring.refine.training_mix import write_mix
from flows.launch import torchrun
from flows.launch.launcher import KeptRanks, launch
from tests.conftest import ORIGIN, TINY_MODEL, Layout, Ranks, read_rows
from tests.forked_ranks import forking
from tests.trainer.measured_training_job import MeasuredTrainJob
from trainer.checkpoint_folder import list_checkpoints
from trainer.job import Job
from trainer.jobs import CalibrateJob, ScoreJob, TrainJob
from trainer.parallel_config import ParallelConfig

LAYOUTS = {"tp2": (2, 1, 1), "pp2": (1, 2, 1), "pp2-vpp2": (1, 2, 1, 2), "dp2": (1, 1, 2)}


class Launches:
    """Counts what starts ranks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        start = torchrun.start

        def note(*arguments: object, **options: object) -> object:
            self.count += 1
            return start(*arguments, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(torchrun, "start", note)


def jobs_of(ranks: Ranks, name: str, layout: Layout, precision: str) -> tuple[TrainJob, Job, Job]:
    """Return the jobs of training a round, and of calibrating and scoring it."""
    folder = ranks.folder / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_mix(folder / "mix.parquet", f"select shard, sample from '{ranks.corpus.samples_path}' limit 20", 0, 1)
    changes = {"precision": precision, "score": ScoreConfig(micro_batch_size=4)}
    model = TINY_MODEL.model_copy(update={"num_layers": 4})
    train = ranks.job(name, layout, model=model).model_copy(update=changes)
    weights = folder / "checkpoint" / f"step-{num_steps(ranks, train):08d}"
    common = {name: getattr(train, name) for name in Job.model_fields} | {"weights": weights, "origin": ORIGIN}
    calibrate = CalibrateJob(**common, score=train.score, round_number=1)
    return train, calibrate, ScoreJob(**common, score=train.score)


def num_steps(ranks: Ranks, job: TrainJob) -> int:
    return -(-len(read_rows(job.round_folder / "mix.parquet", "sample")) // job.train.global_batch_size)


def results(folder: Path) -> tuple[np.ndarray, bytes]:
    losses = np.array(read_rows(folder / "losses", "loss"), np.float32)
    return losses, np.array(read_rows(folder / "calibration.parquet", "loss"), np.float32).tobytes()


PRECISIONS = ("float32", "bfloat16")
# Each layout by default in one precision, and each precision with two layouts.
QUICK = {("tp2", "bfloat16"), ("pp2", "float32"), ("pp2-vpp2", "bfloat16"), ("dp2", "float32")}
CASES = [
    pytest.param(
        layout, precision, id=f"{name}-{precision}", marks=() if (name, precision) in QUICK else pytest.mark.slow
    )
    for name, layout in LAYOUTS.items()
    for precision in PRECISIONS
]


@pytest.mark.parametrize(("layout", "precision"), CASES)
def test_losses_are_those_of_the_checkpoint_bit_for_bit(ranks: Ranks, layout: Layout, precision: str) -> None:
    train, calibrate, score = jobs_of(ranks, f"kept-{precision}-{layout}", layout, precision)
    folder = train.round_folder
    with forking(), pytest.MonkeyPatch.context() as patch, KeptRanks() as kept:
        launches = Launches(patch)
        launch(train, ranks.folder, "train", silent, kept=kept)
        # No rank can load what is not there.
        (folder / "checkpoint").rename(folder / "hidden")
        launch(calibrate, ranks.folder, "calibrate", silent, kept=kept)
        launch(score, ranks.folder, "score", silent, kept=kept)
        assert launches.count == 1
    (folder / "hidden").rename(folder / "checkpoint")
    assert [path.name for path in list_checkpoints(folder / "checkpoint")] == [score.weights.name]  # type: ignore[attr-defined]
    losses, calibration = results(folder)
    shutil.rmtree(folder / "losses")
    (folder / "calibration.parquet").unlink()
    with forking():
        launch(calibrate, ranks.folder, "calibrate", silent)
        launch(score, ranks.folder, "score", silent)
    again, calibration_again = results(folder)
    assert len(losses) > 100
    assert losses.tobytes() == again.tobytes()
    assert calibration == calibration_again
    assert list((ranks.folder / "logs").glob("*.next.json")) == []
    assert list((ranks.folder / "logs").glob("*.done.json")) == []


@pytest.mark.parametrize("precision", PRECISIONS)
def test_after_training_only_the_weights_stay_in_memory(ranks: Ranks, precision: str) -> None:
    train, *_ = jobs_of(ranks, f"memory-{precision}", (1, 1, 1), precision)
    job = MeasuredTrainJob.model_validate(dict(train))
    with forking():
        launch(job, ranks.folder, "memory", silent)
    measured = read_json(job.result)
    assert measured["weights"] > 50_000
    # Gradients and the optimizer's two moments alone would be three times the weights.
    assert measured["after"] - measured["before"] < 0.1 * measured["weights"]


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel": ParallelConfig()},
        {"precision": "bfloat16"},
        {"activation_kernel": "triton"},
        {"score": ScoreConfig(loss_kernel="reference")},
        {"corpus": Path("other")},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_ranks_that_are_set_up_differently_cannot_follow(ranks: Ranks, changes: dict[str, object]) -> None:
    train, _, score = jobs_of(ranks, "other", (1, 1, 2), "float32")
    assert score.can_follow(train)
    assert not score.model_copy(update=changes).can_follow(train)
    assert not train.can_follow(train)
