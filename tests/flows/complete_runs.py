"""Complete runs of a few rounds, and the errors of commands on them."""

from pathlib import Path
from typing import Any

import pytest

from data_scoring.base.progress import silent
from flows.cli.main import main
from flows.run.config import RunConfig, parse_config
from flows.run.folder import Run, open_run
from flows.run.locks import locked
from flows.stages.stage_order import complete_all, steps_of
from tests.flows.fakes import values


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
    capsys.readouterr()
    assert main([*arguments]) == 1
    [line] = capsys.readouterr().err.splitlines()
    return line
