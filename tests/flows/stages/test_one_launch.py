"""A round is launched once; killed between or within its stages, it ends as if it had not been."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_scoring.base.progress import silent
from flows.launch import torchrun
from flows.launch.launcher import KeptRanks, Launcher
from flows.run.config import RunConfig, parse_config
from flows.run.folder import Run, open_run
from flows.run.locks import locked, wait_for_ranks_to_end
from flows.stages.stage_order import complete_all, stages_of, steps_of
from tests.conftest import make_documents, read_rows
from tests.evaluation_data import write_items
from tests.flows.equal_runs import assert_equal_runs
from tests.forked_ranks import ForkedRanks, forking


class KilledError(BaseException):
    """Stands in for the end of the command."""


def configure(folder: Path, name: str, **changes: Any) -> RunConfig:
    """Return the configuration of a run of two rounds that trains, evaluates, calibrates and scores."""
    values = {
        "name": name, "output": str(folder), "device": "cpu",
        "corpus": {
            "sources": [{"name": "a", "path": str(folder / "a.txt"), "document": "line"}],
            "seq_length": 256, "num_shards": 3, "validation_fraction": 0.1,
        },
        "tokenizer": {"vocab_size": 300},
        "model": {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "ffn_hidden_size": 16},
        "train": {"global_batch_size": 4, "micro_batch_size": 2},
        "score": {"micro_batch_size": 1, "budget": "auto", "calibration_samples": 20, "min_correlation": 1.0},
        "parallel": {"data": 2},
        "eval": {"tasks": ["boolq", "piqa"], "data": str(folder / "items")},
        **changes,
    }  # fmt: skip
    return parse_config(values, "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rounds")
    (folder / "items").mkdir()
    write_items(folder / "items")
    (folder / "a.txt").write_text("\n".join(make_documents(150)))
    return folder


class Starts:
    """The launches that start ranks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        start = torchrun.start

        def note(job_path: Path, *arguments: Any, **options: Any) -> Any:
            self.names.append(job_path.name.removesuffix(".job.json"))
            return start(job_path, *arguments, **options)

        monkeypatch.setattr(torchrun, "start", note)


def work(config: RunConfig) -> Run:
    with locked(config.folder):
        run = open_run(config)
        complete_all(run, steps_of(config), silent)
    return run


@pytest.fixture(scope="module")
def unbroken(folder: Path) -> tuple[Run, list[str]]:
    with forking(), pytest.MonkeyPatch.context() as patch:
        starts = Starts(patch)
        return work(configure(folder, "unbroken")), starts.names


@pytest.fixture
def prepared(folder: Path, unbroken: tuple[Run, list[str]]) -> Iterator[RunConfig]:
    """The configuration of a run that has its corpus and nothing else."""
    config = configure(folder, "broken")
    run = open_run(config)
    shutil.copytree(unbroken[0].corpus_folder, run.corpus_folder)
    yield config
    shutil.rmtree(run.folder)


def test_a_round_is_launched_once(unbroken: tuple[Run, list[str]]) -> None:
    run, launches = unbroken
    assert launches == ["train-1", "train-2"]
    jobs = {path.name.removesuffix(".job.json") for path in (run.folder / "logs").glob("*.job.json")}
    assert jobs >= {"train-1", "evaluate-1", "calibrate-1", "train-2", "evaluate-2"}
    assert {path.name for path in (run.folder / "logs").glob("*.json")} == {*(f"{job}.job.json" for job in jobs),
                                                                          "progress.json"}  # fmt: skip
    assert all(stages_of(run).is_complete(step.stage.name, step.round_number) for step in steps_of(run.config))


def assert_as_unbroken(run: Run, unbroken: Run) -> None:
    assert_equal_runs(run.folder, unbroken.folder)
    for number in (1, 2):
        for file in (f"rounds/{number}/evaluation/step-*/scores/*.parquet",):
            mine, theirs = (
                {path.name: read_rows(path, "task", "score") for path in each.folder.glob(file)}
                for each in (run, unbroken)
            )
            assert mine == theirs != {}
    calibrations = [read_rows(each.round_folder(1) / "calibration.parquet", "shard", "sample", "loss")
                    for each in (run, unbroken)]  # fmt: skip
    assert calibrations[0] == calibrations[1]
    for pattern in (".*.tmp*", ".*.reserved", "*.next.json", "*.done.json"):
        assert [*run.folder.rglob(pattern)] == []
    stages_of(run).verify()


# After which event the kill comes, and the job that the next command starts ranks for: one that was given to ranks may
# be done before these notice that their launcher is gone.
MOMENTS = {
    "train-1 done": ("train-1",),
    "train recorded": ("evaluate-1",),
    "evaluate-1 given": ("evaluate-1", "calibrate-1"),
    "evaluate-1 done": ("calibrate-1",),
    "calibrate-1 done": ("score-1",),
    "score-1 given": ("score-1",),
    "score-1 done": ("score-1",),
    "train-2 done": ("train-2",),
}


def moments(*quick: str) -> list[Any]:
    """Return all moments; only those in `quick` are tested by default."""
    return [moment if moment in quick else pytest.param(moment, marks=pytest.mark.slow) for moment in MOMENTS]


def at(moment: str, act: Callable[[], None], patch: pytest.MonkeyPatch) -> Callable[[], Launcher]:
    """Call `act` at a moment, once; the function returned gives the launcher of that moment."""
    keep, hand_over, record = KeptRanks.keep, Launcher.hand_over, Run.record
    seen: list[Launcher] = []
    acted: list[str] = []

    def reach(found: str) -> None:
        if found == moment and not acted:
            acted.append(found)
            act()

    def note_kept(self: KeptRanks, launcher: Launcher) -> None:
        seen.append(launcher)
        keep(self, launcher)
        reach(f"{launcher.name} done")

    def note_given(self: Launcher, job: Any, name: str) -> None:
        hand_over(self, job, name)
        reach(f"{name} given")

    def note_recorded(self: Run, stage: str, *arguments: Any) -> None:
        record(self, stage, *arguments)
        reach(f"{stage} recorded")

    patch.setattr(KeptRanks, "keep", note_kept)
    patch.setattr(Launcher, "hand_over", note_given)
    patch.setattr(Run, "record", note_recorded)
    return lambda: seen[-1]


def ranks_of(launcher: Launcher) -> list[int]:
    process: ForkedRanks = launcher._process  # type: ignore[attr-defined]
    return [pid for pid in process.pids if pid is not None]


@pytest.mark.parametrize("moment", moments("train recorded", "score-1 given"))
def test_a_rank_is_killed(prepared: RunConfig, unbroken: tuple[Run, list[str]], moment: str) -> None:
    with forking(), pytest.MonkeyPatch.context() as patch:
        starts = Starts(patch)
        current = at(moment, lambda: os.kill(ranks_of(current())[1], signal.SIGKILL), patch)
        patch.setattr("flows.launch.launcher._pause", lambda *_: None)
        run = work(prepared)
        # Nothing follows in round 1 once it is scored, nor in round 2 once it is evaluated.
        assert len(starts.names) == (2 if moment == "score-1 done" else 3)
    assert_as_unbroken(run, unbroken[0])


@pytest.mark.parametrize("moment", moments("train-1 done", "evaluate-1 done", "score-1 given"))
def test_the_command_is_killed_and_its_ranks_end(
    prepared: RunConfig, unbroken: tuple[Run, list[str]], moment: str
) -> None:
    command = subprocess.Popen(["sleep", "600"])

    def end() -> None:
        command.kill()
        command.wait()
        raise KilledError

    with forking(command.pid), pytest.MonkeyPatch.context() as patch:
        at(moment, end, patch)
        # What is killed stops nothing and writes nothing.
        patch.setattr("flows.launch.launcher._end", lambda _: None)
        with pytest.raises(KilledError):
            work(prepared)
    started = time.monotonic()
    wait_for_ranks_to_end(prepared.folder / ".ranks.lock", 60)
    assert time.monotonic() - started < 30
    with forking(), pytest.MonkeyPatch.context() as patch:
        starts = Starts(patch)
        run = work(prepared)
        assert starts.names[0] in MOMENTS[moment]
        assert len(starts.names) == (2 if not moment.startswith("train-2") else 1)
    assert_as_unbroken(run, unbroken[0])
