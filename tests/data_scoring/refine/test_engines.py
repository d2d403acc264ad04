"""Refining on every engine writes the files that it writes in this process, byte by byte."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_scoring.base.engine import Engine, LocalEngine
from data_scoring.base.parquet import write_parquet
from data_scoring.base.progress import silent
from data_scoring.losses.shard_scoring import losses_path
from data_scoring.refine import policies
from data_scoring.refine.candidates import Draw
from data_scoring.refine.policies import POLICIES
from data_scoring.refine.refine_config import RefineConfig, SourceRule
from data_scoring.refine.refine_shards import mix_selection, refine, selection_path
from tests.conftest import read_rows
from tests.data_scoring.conftest import ENGINES
from tests.data_scoring.odd_engines import DeadlyEngine, TwiceEngine
from tests.data_scoring.refine.loss_per_root_token import LOSS_PER_ROOT_TOKEN
from tests.data_scoring.refine.test_parts import PARTS, SEED, SHARDS, SIZE, Facts, draw_of

RULES = (
    SourceRule(name="a", at_most=0.2),
    SourceRule(name="b", at_least=0.7),
)
CASES: dict[str, dict[str, Any]] = {
    **{name: {"policy": name} for name in sorted(POLICIES.keys() - {LOSS_PER_ROOT_TOKEN.name})},
    "rules": {"sources": RULES},
    "late": {"sources": (SourceRule(name="b", from_round=2),)},
    "guards": {"outlier_z": 2.0, "near_duplicates": 0.8, "max_rounds": 1, "min_tokens": 4, "max_tokens": 3000},
    "weights": {"weights": "inverse", "sources": RULES},
    "batches": {"policy": "loss_batch", "keep_batches": True},
}


@pytest.fixture(scope="module")
def facts_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_facts(tmp_path_factory.mktemp("facts"))


def write_facts(folder: Path) -> Path:
    """Write what refining reads into `folder`, and return it."""
    facts = Facts(folder)
    for name, chosen in (("near", slice(None, None, 7)), ("listed", slice(None, None, 11))):
        columns = {"shard": facts.shard[chosen].astype(np.int32), "sample": facts.sample[chosen].astype(np.int32)}
        write_parquet(folder / f"{name}.parquet", pa.table(columns), name)
    return folder


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str, str], dict[str, bytes]]:
    """What refining in this process writes, by case."""
    return {}


def draw_for(folder: Path, case: str, within: str) -> Draw:
    config = {
        "outlier_z": 6.0, "sampling_rate": 0.4, "drop_hardest": 0.2, "reference": str(folder / "reference"),
        "sql": "loss - 0.5 * coalesce(seen_loss, 0)", "within": within, **CASES[case],
    }  # fmt: skip
    draw = draw_of(folder, **config)
    if case != "guards":
        return draw
    lists = (folder / "near.parquet", folder / "listed.parquet")
    return Draw(folder, 2, draw.config, SEED, [SIZE] * SHARDS, *lists, num_parts=PARTS)


def written(draw: Draw, engine: Engine) -> dict[str, bytes]:
    """Return the content of all files of a round that is refined on `engine`, and remove them."""
    refine(draw, "refined", engine, silent)
    mix_selection(draw.target / "mix.parquet", draw, draw.rounds / "samples.parquet")
    files = {str(path.relative_to(draw.target)): path.read_bytes() for path in draw.target.rglob("*") if path.is_file()}
    shutil.rmtree(draw.target)
    return files


def pairs() -> Iterator[Any]:
    """Yield engines, cases and places; this process, with which others are compared, has few that are not slow."""
    for engine in ENGINES:
        for case in CASES:
            for within in ("shard", "part"):
                is_quick = engine != "in-process" or (case, within) in {("loss", "shard"), ("batches", "part")}
                yield pytest.param(engine, case, within, marks=() if is_quick else pytest.mark.slow)


@pytest.mark.parametrize(("engine", "case", "within"), pairs(), indirect=["engine"], scope="session")
def test_every_engine_writes_the_same_files(
    facts_folder: Path, engine: Engine, expected: dict[tuple[str, str], dict[str, bytes]], case: str, within: str
) -> None:
    draw = draw_for(facts_folder, case, within)
    if (case, within) not in expected:
        expected[case, within] = written(draw, LocalEngine(1))
    assert len(expected[case, within]) == SHARDS + 2
    assert written(draw, engine) == expected[case, within]


def test_a_rerun_goes_on_with_the_shards_that_are_left(facts_folder: Path, tmp_path: Path) -> None:
    draw = draw_for(facts_folder, "loss", "part")
    files = written(draw, LocalEngine(1))
    with (
        DeadlyEngine(2, tmp_path / "killed") as engine,
        pytest.raises(ValueError, match="a process of the pool was killed"),
    ):
        refine(draw, "refined", engine, silent)
    with TwiceEngine() as engine:
        assert written(draw, engine) == files


def test_a_policy_that_was_added_is_known_to_all_workers(
    facts_folder: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(policies.POLICIES, LOSS_PER_ROOT_TOKEN.name, LOSS_PER_ROOT_TOKEN)
    draw = draw_of(facts_folder, policy=LOSS_PER_ROOT_TOKEN.name, outlier_z=6.0)
    refine(draw, "refined", engine, silent)
    reasons = {reason for _, reason in read_rows(selection_path(draw.target, 0), "kept", "reason")}
    shutil.rmtree(draw.target)
    assert reasons == {LOSS_PER_ROOT_TOKEN.reason, "not drawn"}


def test_rows_are_in_the_order_of_the_losses_if_a_shard_is_small(tmp_path: Path) -> None:
    """DuckDB would look up such a shard's samples in the rows of the mix, in the order of several threads."""
    generator, sizes = np.random.default_rng(0), (600_000, 3_000)
    for shard, size in enumerate(sizes):
        table = {
            "sample": np.arange(size, dtype=np.int32), "num_tokens": np.full(size, 32, np.int32),
            "source": ["a"] * size, "loss": generator.normal(3, 0.6, size).astype(np.float32),
        }  # fmt: skip
        write_parquet(losses_path(tmp_path / "1", shard), pa.table(table), "scored")
    order = generator.permutation(sum(sizes))
    shards = (order >= sizes[0]).astype(np.int32)
    mix = pa.table({"shard": shards, "sample": (order - shards * sizes[0]).astype(np.int32)})
    write_parquet(tmp_path / "1" / "mix.parquet", mix, "mixed")
    draw = Draw(tmp_path, 2, RefineConfig(within="part"), SEED, [*sizes])
    refine(draw, "refined", LocalEngine(1), silent)
    assert pq.read_table(selection_path(draw.target, 1))["sample"].to_pylist() == list(range(sizes[1]))
