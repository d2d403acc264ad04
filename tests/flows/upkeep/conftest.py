"""What tests of forks and of cleaning share: runs of a few rounds, in a folder of their own."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from data_scoring.base.progress import silent
from flows.run.config import RunConfig, parse_config
from flows.run.folder import Run, open_run, read_run
from flows.run.locks import locked
from flows.stages.stage_order import complete_all, steps_of
from tests.conftest import MakeOnce
from tests.flows.fakes import FakeRanks, values, write_texts


def config_of(folder: Path, name: str = "run", texts: Path | None = None, **sections: Any) -> RunConfig:
    """Return the configuration of a run in `folder` over the texts in `texts`, by default the same folder."""
    given = {**values(texts or folder, folder), "name": name, "score": {"budget": "full"}}
    return parse_config({**given, "train": {"global_batch_size": 16, "micro_batch_size": 16}, **sections}, "test")


def complete_run(config: RunConfig) -> Run:
    """Return the run of `config`, complete."""
    with locked(config.folder):
        run = open_run(config)
        complete_all(run, steps_of(config), silent)
    return run


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the one line of error that a command ends with."""
    from flows.cli.main import main

    capsys.readouterr()
    assert main([*arguments]) == 1
    [line] = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture
def scored(make_once: MakeOnce, tmp_path: Path, fakes: FakeRanks) -> Run:
    """A copy of a run of three rounds that fake ranks have trained."""

    def fill(folder: Path) -> None:
        write_texts(folder)
        complete_run(config_of(folder, rounds={"num_rounds": 3}))

    shutil.copytree(make_once("forked-fake-run", fill) / "run", tmp_path / "run")
    return read_run(tmp_path / "run")
