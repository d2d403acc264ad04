"""The one list of stages: its order by configuration, and a stage of one's own in everything that reads it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest
import yaml

from data_scoring.base.progress import silent
from flows.cli.main import main
from flows.experiments.trials import Trial, prepare_corpus, train_trial, trial_config
from flows.run.config import RunConfig, parse_config
from flows.run.folder import read_run
from flows.stages.stage_order import STAGES, is_complete, steps_of, steps_of_command, steps_to_train
from flows.stages.status import read_status
from tests import ROOT
from tests.flows.fakes import FakeRanks, values
from tests.flows.stages.own_stage import CountTokens


@pytest.fixture
def own_stage() -> Iterator[None]:
    """A stage of one's own between mix and train."""
    names = [stage.name for stage in STAGES]
    STAGES.insert(names.index("train"), CountTokens())
    yield
    del STAGES[names.index("train")]


def order(config: RunConfig) -> list[str]:
    return [step.name for step in steps_of(config)]


def test_the_order_is_that_of_the_configuration(texts: Path, tmp_path: Path) -> None:
    def configured(**sections: Any) -> RunConfig:
        return parse_config({**values(texts, tmp_path), **sections}, "test")

    assert order(configured(rounds={"num_rounds": 1})) == ["prepare", "mix 1", "train 1"]
    everything = configured(
        rounds={"num_rounds": 3},
        eval={"tasks": ["piqa"], "contamination": "report"},
        model={**values(texts, tmp_path)["model"], "inherit": {"from": "larger"}},
    )
    assert order(everything) == [
        *("prepare", "contamination", "inherit 1", "mix 1", "train 1", "evaluate 1"),
        *("score 1", "refine 2", "mix 2", "train 2", "evaluate 2"),
        *("score 2", "refine 3", "mix 3", "train 3", "evaluate 3"),
    ]
    to_train = [step.name for step in steps_to_train(everything, 2)]
    assert to_train == [name for name in order(everything)[:10] if name != "evaluate 1"]
    commands = {
        (command, place): [step.name for step in steps_of_command(everything, command, place)]
        for command, place in (("prepare", 0), ("train", 1), ("score", 2), ("refine", 2), ("train", 2), ("evaluate", 2))
    }
    assert commands == {
        ("prepare", 0): ["prepare"],
        ("train", 1): ["contamination", "inherit 1", "mix 1", "train 1"],
        ("score", 2): ["score 1"],
        ("refine", 2): ["refine 2", "mix 2"],
        ("train", 2): ["train 2"],
        ("evaluate", 2): ["evaluate 2"],
    }


def test_a_stage_of_ones_own_is_a_stage_of_every_run(
    own_stage: None, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values(texts, tmp_path)))
    # The flow has a process and a Prefect server of its own.
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "prefect"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.flows.stages.run_with_own_stage", str(path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run = read_run(tmp_path / "x")
    expected = ["prepare", "mix 1", "count 1", "train 1", "score 1", "refine 2", "mix 2", "count 2", "train 2"]
    rows = {row.name: row.state for row in read_status(run.folder)}
    assert list(rows) == expected
    assert set(rows.values()) == {"done"}
    for number in (1, 2):
        folder = run.round_folder(number)
        [(trained,)] = duckdb.sql(f"select sum(num_tokens) from '{folder / 'steps.parquet'}'").fetchall()
        assert json.loads((folder / "tokens.json").read_text()) == {"num_tokens": int(trained)}
    # Its command, and what a run lacks without its record.
    run.forget("count", 2)
    assert {row.name: row.state for row in read_status(run.folder)} == rows | {
        "count 2": "stopped",
        "train 2": "waiting",
    }
    capsys.readouterr()
    assert main(["count", str(run.folder)]) == 0
    assert "count of round 2 is complete" in capsys.readouterr().out
    assert is_complete(run, "count", 2)


def test_a_stage_of_ones_own_is_a_stage_of_every_trial(
    own_stage: None, config: RunConfig, tmp_path: Path, fakes: FakeRanks
) -> None:
    folder = tmp_path / "trials"
    corpus = prepare_corpus(config, folder, "corpus", 0, silent)
    assert not (corpus.round_folder(1) / "tokens.json").exists()
    run = train_trial(trial_config(config, folder, Trial("one"), 0), corpus, silent)
    assert (run.round_folder(1) / "tokens.json").exists()
    assert [row.name for row in read_status(run.folder)] == ["prepare", "mix 1", "count 1", "train 1"]
