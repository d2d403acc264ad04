"""What is on disk is what was written: every file of a run folder, damaged in every way, between all stages."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_scoring.base.files import checksum, fingerprint
from data_scoring.base.progress import silent
from flows.run.config import parse_config
from flows.run.folder import Run, open_run, read_run
from flows.stages.stage_order import complete, stages_of, steps_of
from tests.conftest import MakeOnce
from tests.flows.fakes import FakeRanks, fake_ranks, values, write_texts

# Not results: locks, logs, memory of what was verified, the ledger, whose views are written again, and the checkpoints,
# which the fake ranks leave empty (tests/trainer/test_checkpoint_folder.py damages real ones).
# The views' files without rows, in the hidden folders, are part of the ledger.
_NOT_RESULTS = (".lock", ".report.lock", ".ledger.lock", ".verified.json", "ledger.duckdb", "run.yaml.bak")
_HIDDEN = (".ounds", ".orpus")
# Tables that say how long work took, and their columns that do.
_WITH_TIMES, _TIMES = ("steps.parquet", "budget.parquet"), ("seconds", "ended_at")


def damage_bytes(at: float) -> Callable[[Path], None]:
    """Return what flips a byte at a share of a file's length."""

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[min(int(at * len(content)), len(content) - 1)] ^= 0x11
        write_anew(path, bytes(content))

    return flip


def cut(path: Path) -> None:
    write_anew(path, path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    write_anew(path, b"")


def append(path: Path) -> None:
    write_anew(path, path.read_bytes() + b"x")


def write_anew(path: Path, content: bytes) -> None:
    # The copies of a run folder share their files.
    path.unlink()
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    **{f"flip at {at}": damage_bytes(at) for at in (0.0, 0.3, 0.5, 0.7, 1.0)},
    "cut": cut,
    "empty": empty,
    "appended": append,
    "missing": Path.unlink,
}


# The stages after which a run is damaged: after the last one, everything is there.
STOPS = ("prepare", "score 1", "train 2")


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRanks]:
    yield fake_ranks(monkeypatch)


def finish(run: Run) -> None:
    """Do what is left of a run's stages."""
    for step in steps_of(run.config):
        complete(run, step.stage.name, step.round_number, silent)


def results(folder: Path) -> dict[str, str]:
    """Return a digest of each result of a run, by its path in the run folder; those of the same run are equal."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in _NOT_RESULTS)
    names = {path.relative_to(folder).as_posix(): path for path in files}
    names = {name: path for name, path in names.items() if not name.startswith(_HIDDEN)}
    return {
        name: without_times(path) if path.name in _WITH_TIMES else checksum(path)
        for name, path in sorted(names.items())
        # Records hold times; a checkpoint is verified by what loads it.
        if not name.startswith("logs/") and "/checkpoint/" not in name and not name.endswith(".json")
    }


def without_times(path: Path) -> str:
    table = pq.read_table(path)
    return fingerprint(table.drop_columns([name for name in _TIMES if name in table.column_names]).to_pylist())


def make_runs(folder: Path) -> None:
    """Write a run, and copies of it as it was after some of its stages, by their names."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        fake_ranks(monkeypatch)
        write_texts(folder)
        config = {**values(folder, folder / "runs"), "rounds": {"num_rounds": 2}, "refine": {"near_duplicates": 0.9}}
        run = open_run(parse_config(config, "test"))
        for step in steps_of(run.config):
            complete(run, step.stage.name, step.round_number, silent)
            if step.name in STOPS:
                shutil.copytree(run.folder, folder / step.name)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(name, marks=[] if name in ("flip at 0.5", "cut", "missing") else pytest.mark.slow)
        for name in DAMAGES
    ],
)
@pytest.mark.parametrize("last", STOPS)
def test_a_damaged_file_is_named_or_without_effect(
    last: str, damage: str, make_once: MakeOnce, tmp_path: Path, ranks: FakeRanks
) -> None:
    """The next stage names the file, or the run ends with the results of one that was not damaged."""
    runs = make_once("verified", make_runs)
    expected = results(runs / STOPS[-1])
    unseen = []
    for path in [path for path in (runs / last).rglob("*") if path.is_file()]:
        name = path.relative_to(runs / last)
        if name.name in _NOT_RESULTS or name.parts[0] in _HIDDEN or "checkpoint" in name.parts:
            continue
        target = tmp_path / "x"
        shutil.copytree(runs / last, target, copy_function=os.link)
        DAMAGES[damage](target / name)
        try:
            run = read_run(target)
            stages_of(run).verify()
            finish(run)
        except ValueError as error:
            if str(name) not in str(error) or "\n" in str(error):
                unseen.append(f"{name}: {error}")
        else:
            if results(target) != expected:
                unseen.append(f"{name}: unseen")
        shutil.rmtree(target)
    assert unseen == []
