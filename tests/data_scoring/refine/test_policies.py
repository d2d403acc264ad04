"""A policy that a file of its own adds, as far as a policy goes: configuration, command line, draw, comparison."""

from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from data_scoring.base.engine import LocalEngine
from data_scoring.base.parquet import write_parquet
from data_scoring.base.progress import silent
from data_scoring.base.sql import random_bits
from data_scoring.losses.shard_scoring import losses_path
from data_scoring.refine.candidates import Draw
from data_scoring.refine.policies import POLICIES, Policy
from data_scoring.refine.refine_config import RefineConfig
from data_scoring.refine.refine_shards import refine, selection_path
from flows.cli.main import main
from flows.experiments.arms import policy_comparison
from flows.experiments.compare import compare
from flows.experiments.equal_arms import needs_losses
from flows.run.config import RunConfig, parse_config
from flows.run.folder import read_run
from tests.conftest import read_rows
from tests.data_scoring.refine.loss_per_root_token import LOSS_PER_ROOT_TOKEN
from tests.flows.fakes import fake_ranks, values, write_texts

NAME = LOSS_PER_ROOT_TOKEN.name
SIZE = 2_000


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> Policy:
    monkeypatch.setitem(POLICIES, NAME, LOSS_PER_ROOT_TOKEN)
    return LOSS_PER_ROOT_TOKEN


def write_shard(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Write the losses of one shard and return them, [SIZE] float64."""
    losses = np.random.default_rng(5).normal(3, 0.6, SIZE).astype(np.float32)
    table = {
        "sample": np.arange(SIZE, dtype=np.int32), "num_tokens": tokens.astype(np.int32), "source": ["a"] * SIZE,
        "loss": losses,
    }  # fmt: skip
    write_parquet(losses_path(folder, 0), pa.table(table), "scored")
    return losses.astype(float)


def draw_of(folder: Path) -> Draw:
    return Draw(folder, 2, RefineConfig(policy=NAME, sampling_rate=0.3, outlier_z=None), 9, [SIZE])


def test_it_is_drawn_exactly_and_gives_its_reason(added: Policy, tmp_path: Path) -> None:
    tokens = np.random.default_rng(6).integers(1, 400, SIZE)
    losses = write_shard(tmp_path / "1", tokens)
    refine(draw_of(tmp_path), "refined", LocalEngine(1), silent)
    rows = read_rows(selection_path(tmp_path / "2", 0), "sample", "kept", "reason")
    bits = duckdb.sql(f"select {random_bits(9, 2, 0, 'range::int')} as b from range({SIZE})").fetchnumpy()["b"]
    uniform = ((bits >> np.uint64(12)).astype(float) + 0.5) / 2.0**52
    keys = losses / np.sqrt(tokens) / 0.1 - np.log(-np.log(uniform))
    assert {sample for sample, kept, _ in rows if kept} == {*np.argsort(-keys)[:600].tolist()}
    assert {reason for _, kept, reason in rows if kept} == {added.reason}
    assert {reason for _, kept, reason in rows if not kept} == {"not drawn"}


def test_a_score_that_is_not_finite_is_named(added: Policy, tmp_path: Path) -> None:
    tokens = np.ones(SIZE)
    tokens[7] = 0
    write_shard(tmp_path / "1", tokens)
    with pytest.raises(ValueError, match=rf"refine\.policy: {NAME}: the score of sample 7 of shard 0 is no"):
        refine(draw_of(tmp_path), "refined", LocalEngine(1), silent)


def test_the_configuration_takes_it_and_lists_it(added: Policy) -> None:
    refine_config = RunConfig.model_validate({"refine": {"policy": NAME}}).refine
    assert (refine_config.policy, refine_config.draw_temperature, refine_config.draw_rate) == (NAME, 0.1, 0.5)
    schema = RefineConfig.model_json_schema()["properties"]["policy"]
    assert schema["enum"] == [*POLICIES] and schema["enum"][-1] == NAME
    assert f"; {NAME} {added.description}." in schema["description"]
    with pytest.raises(ValueError, match=rf"refine.policy: input should be 'loss', .* or '{NAME}' \(it is 'x'\)"):
        parse_config({"refine": {"policy": "x"}}, "test")


def test_without_it_the_name_is_refused() -> None:
    with pytest.raises(ValueError, match=rf"or 'sql' \(it is '{NAME}'\); correct it"):
        parse_config({"refine": {"policy": NAME}}, "test")
    assert NAME not in RefineConfig.model_json_schema()["properties"]["policy"]["enum"]


def test_the_command_line_and_comparisons_take_it(
    added: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes = fake_ranks(monkeypatch)
    config = parse_config(values(write_texts(tmp_path), tmp_path / "runs"), "test")
    page = compare(config, policy_comparison(f"{NAME},random"), 1, None, silent).page
    assert [job for job in fakes.jobs if "base" not in job] == [f"{NAME}-seed-0 train-2", "random-seed-0 train-2"]
    run = read_run(page.parent / f"{NAME}-seed-0")
    assert needs_losses(run.config.refine)
    assert {reason for (reason,) in read_rows(selection_path(run.round_folder(2), 0), "reason")} <= {
        added.reason, "not drawn", "outlier",
    }  # fmt: skip
    assert main(["refine", str(run.folder), "--round", "2", "--dry-run", "--policy", NAME]) == 0
    assert f"policy {NAME}, sampling rate 0.5" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["refine", str(run.folder), "--dry-run", "--policy", "x"])
    assert NAME in capsys.readouterr().err
