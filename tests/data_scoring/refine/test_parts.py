"""Draws within parts of the training order, against exhaustive probabilities and a second implementation in NumPy."""

from collections import Counter
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import chisquare

from data_scoring.base.engine import LocalEngine
from data_scoring.base.parquet import write_parquet
from data_scoring.base.progress import silent
from data_scoring.base.sql import random_bits
from data_scoring.losses.shard_scoring import losses_path
from data_scoring.refine.candidates import Draw, Limits, candidates_query, find_limits
from data_scoring.refine.part_bars import find_part_bars
from data_scoring.refine.policies import POLICIES
from data_scoring.refine.refine_config import RefineConfig, SourceRule
from data_scoring.refine.refine_shards import mix_selection, refine, selection_path
from data_scoring.refine.selection import Selection
from data_scoring.refine.selection_summary import dry_run, summarise_selection
from data_scoring.refine.training_mix import Mix
from tests.conftest import read_rows
from tests.data_scoring.refine.test_refine_shards import exact_probabilities
from tests.data_scoring.refine.test_selection import gumbel

SHARDS, SIZE, PARTS, BATCH, SEED = 3, 400, 5, 8, 13
# The round trained on all but the last 31 samples of every shard.
TRAINED = SIZE - 31


class Facts:
    """What there is to know of all samples, shard by shard: arrays [SHARDS * SIZE]."""

    def __init__(self, folder: Path) -> None:
        generator = np.random.default_rng(5)
        count = SHARDS * SIZE
        self.shard, self.sample = np.divmod(np.arange(count), SIZE)
        self.source = generator.choice(["a", "b"], count, p=[0.7, 0.3])
        self.tokens = generator.integers(1, 33, count)
        self.loss = generator.normal(3, 0.8, count).astype(np.float32).astype(float)
        self.seen = generator.normal(3, 0.8, count).astype(np.float32).astype(float)
        self.reference = generator.normal(3, 0.8, count).astype(np.float32).astype(float)
        order = generator.permutation(np.flatnonzero(self.sample < TRAINED))
        self.place = np.full(count, -1)
        self.place[order] = np.arange(len(order))
        self.part = np.where(self.place < 0, PARTS, self.place * PARTS // len(order))
        self.num_trained = len(order)
        columns = {"shard": self.shard.astype(np.int32), "sample": self.sample.astype(np.int32)}
        mixed = {name: column[order] for name, column in columns.items()}
        write_parquet(folder / "1" / "mix.parquet", pa.table(mixed), "mixed")
        seen = pa.table({**mixed, "step": self.place[order] // BATCH + 1, "loss": self.seen[order].astype(np.float32)})
        write_parquet(folder / "1" / "seen" / "step=00000001-replica=0000.parquet", seen, "seen")
        write_parquet(
            folder / "samples.parquet", pa.table({**columns, "source": self.source, "num_tokens": self.tokens}), "s"
        )
        for shard in range(SHARDS):
            mine = self.shard == shard
            for place, losses in ((folder / "1", self.loss), (folder / "reference", self.reference)):
                table = {
                    "shard": self.shard[mine].astype(np.int32),
                    "sample": self.sample[mine].astype(np.int32), "num_tokens": self.tokens[mine].astype(np.int32),
                    "source": self.source[mine], "loss": losses[mine].astype(np.float32),
                }  # fmt: skip
                write_parquet(losses_path(place, shard), pa.table(table), "scored")

    def batches(self) -> np.ndarray:
        """Return the number of each sample's batch."""
        alone = -1 - (self.shard << 32) - self.sample // BATCH
        return np.where(self.place < 0, alone, self.place // BATCH)

    def batch_parts(self) -> np.ndarray:
        """Return the part of the first sample of each sample's batch."""
        return np.where(self.place < 0, PARTS, self.place // BATCH * BATCH * PARTS // self.num_trained)

    def noise(self, is_by_batch: bool) -> np.ndarray:
        with duckdb.connect() as connection:
            units = pa.table({"shard": self.shard, "sample": self.sample, "batch": self.batches()})
            connection.register("units", units)
            unit = ("batch::bigint",) if is_by_batch else ("shard::bigint", "sample::int")
            bits = connection.sql(f"select {random_bits(SEED, 2, *unit)} as bits from units").fetchnumpy()["bits"]
        return gumbel(bits)


@pytest.fixture
def facts(tmp_path: Path) -> Facts:
    return Facts(tmp_path)


def draw_of(folder: Path, **config: Any) -> Draw:
    config = {"outlier_z": None, "batch_size": BATCH, "within": "part", **config}
    return Draw(folder, 2, RefineConfig(**config), SEED, [SIZE] * SHARDS, num_parts=PARTS)


def selected(draw: Draw) -> dict[str, np.ndarray]:
    """Return the selection from all shards, in their order."""
    limits = find_limits(draw, LocalEngine(1), draw.rounds)
    bars = find_part_bars(draw, limits, LocalEngine(1), draw.rounds)
    with duckdb.connect() as connection:
        selection = Selection(connection, draw, limits, bars)
        shards = [
            connection.sql(f"from ({selection.query(shard)}) order by sample").fetchnumpy() for shard in range(SHARDS)
        ]
    return {name: np.ma.concatenate([rows[name] for rows in shards]) for name in shards[0]}


def expected_keys(facts: Facts, policy: str) -> np.ndarray:
    seen = np.where(facts.place < 0, 0.0, facts.seen)
    _, batches = np.unique(facts.batches(), return_inverse=True)
    means = np.bincount(batches, facts.loss * facts.tokens) / np.bincount(batches, facts.tokens)
    scores = {
        "loss": facts.loss, "top": facts.loss, "band": facts.loss, "random": 0 * facts.loss, "all": 0 * facts.loss,
        "forgetting": facts.loss - seen, "excess": facts.loss - facts.reference, "loss_batch": means[batches],
        "sql": facts.loss - 0.5 * seen,
    }  # fmt: skip
    noise = facts.noise(policy == "loss_batch") if POLICIES[policy].temperature else 0
    return scores[policy] + noise


@pytest.mark.parametrize("policy", sorted(POLICIES.keys() - {"loss_per_root_token"}))
def test_every_policy_keeps_the_highest_of_each_part(facts: Facts, tmp_path: Path, policy: str) -> None:
    draw = draw_of(
        tmp_path, policy=policy, sampling_rate=0.3, drop_hardest=0.2, reference=str(tmp_path / "reference"),
        sql="loss - 0.5 * coalesce(seen_loss, 0)",
    )  # fmt: skip
    rows, keys = selected(draw), expected_keys(facts, policy)
    parts = facts.batch_parts() if policy == "loss_batch" else facts.part
    assert set(parts) == set(range(PARTS + 1))
    for part in range(PARTS + 1):
        mine = np.flatnonzero(parts == part)
        if policy == "band":
            # Losses are counted in bins; no two are in the bin at the limit.
            mine = mine[facts.loss[mine] <= np.sort(facts.loss[mine])[int(np.ceil(0.8 * len(mine))) - 1] + 1 / 1024]
            assert abs(len(mine) - 0.8 * (parts == part).sum()) <= 2
        count = int((parts == part).sum() * draw.config.draw_rate + 0.5)
        kept = mine[rows["kept"][mine]]
        if policy == "loss_batch":
            assert len(kept) == count
            # Samples of one batch, the last, may be kept in part.
            assert keys[kept].min() >= np.sort(keys[mine])[-count]
        else:
            assert sorted(kept) == sorted(mine[np.argsort(-keys[mine])][:count])
    assert set(rows["reason"][rows["kept"]]) == {POLICIES[policy].reason}


def test_a_draw_within_parts_differs_from_one_within_shards(facts: Facts, tmp_path: Path) -> None:
    by_part = selected(draw_of(tmp_path, policy="loss", sampling_rate=0.3))["kept"]
    by_shard = selected(draw_of(tmp_path, policy="loss", sampling_rate=0.3, within="shard"))["kept"]
    assert [by_shard[facts.shard == shard].sum() for shard in range(SHARDS)] == [120] * SHARDS
    assert len({by_shard[facts.part == part].mean() for part in range(PARTS)}) > 1
    sizes = np.bincount(facts.part)
    assert [by_part[facts.part == part].sum() for part in range(PARTS + 1)] == [int(0.3 * size + 0.5) for size in sizes]


def test_floors_and_ceilings_hold_within_each_part(facts: Facts, tmp_path: Path) -> None:
    rules = (SourceRule(name="a", at_most=0.2), SourceRule(name="b", at_least=0.7))
    rows, keys = selected(draw_of(tmp_path, sampling_rate=0.3, sources=rules)), expected_keys(facts, "loss")
    for part in range(PARTS + 1):
        groups = {source: np.flatnonzero((facts.part == part) & (facts.source == source)) for source in "ab"}
        wanted = int(0.3 * sum(map(len, groups.values())) + 0.5)
        floor, ceiling = int(0.7 * len(groups["b"])), int(0.2 * len(groups["a"]) + 0.5)
        ranked = {source: mine[np.argsort(-keys[mine])] for source, mine in groups.items()}
        contest = sorted([*ranked["a"][:ceiling], *ranked["b"][floor:]], key=lambda number: -keys[number])
        expected = {*ranked["b"][:floor], *contest[: wanted - floor]}
        assert {number for mine in groups.values() for number in mine[rows["kept"][mine]]} == expected


@pytest.mark.parametrize("policy", ["loss", "random"])
def test_frequencies_within_parts_match_exhaustive_probabilities(policy: str, tmp_path: Path) -> None:
    """Nine samples in two shards, in an order that crosses them: parts of five and four, of which two each are kept.

    Each shard has the same samples again and again, each time with the random numbers of another seed.
    """
    trials, losses = 4_000, np.array([0.3, 1.0, 1.1, 2.5, 3.0, 0.2, 2.0, 2.2, 0.9])
    shards, samples = np.array([0, 1, 1, 0, 0, 1, 0, 1, 0]), np.array([0, 0, 1, 1, 2, 2, 3, 3, 4])
    for shard in range(2):
        mine = shards == shard
        count = int(mine.sum())
        table = {
            "sample": np.tile(samples[mine], trials).astype(np.int32), "source": ["a"] * (count * trials),
            "num_tokens": np.ones(count * trials, np.int32), "trial": np.repeat(np.arange(trials), count),
            "loss": np.tile(losses[mine], trials).astype(np.float32),
        }  # fmt: skip
        write_parquet(losses_path(tmp_path / "1", shard), pa.table(table), "scored")
    mix = pa.table({"shard": shards.astype(np.int32), "sample": samples.astype(np.int32)})
    write_parquet(tmp_path / "1" / "mix.parquet", mix, "mixed")
    config = RefineConfig(policy=policy, within="part")
    draw = Draw(tmp_path, 2, config, "trial", [0, 0], num_parts=2)  # type: ignore[arg-type]
    keys, parts = np.empty((trials, 9)), np.empty((trials, 9), int)
    for shard in range(2):
        with duckdb.connect() as connection:
            rows = connection.sql(candidates_query(draw, Limits(), shard)).fetchnumpy()
        for place in np.flatnonzero(shards == shard):
            mine = rows["sample"] == samples[place]
            keys[:, place], parts[:, place] = rows["key"][mine], rows["stratum"][mine]
    assert (parts == [0, 0, 0, 0, 0, 1, 1, 1, 1]).all()
    for stretch in (slice(0, 5), slice(5, 9)):
        chosen = np.argsort(-keys[:, stretch], axis=1)[:, :2]
        counts = Counter(map(frozenset, chosen.tolist()))
        part = losses[stretch]
        expected = exact_probabilities(np.exp(part) if policy == "loss" else np.ones(len(part)), 2)
        assert counts.keys() <= expected.keys()
        observed = [counts[pair] for pair in expected]
        assert chisquare(observed, np.array(list(expected.values())) * trials).pvalue > 1e-3


def test_a_summary_counts_the_parts(facts: Facts, tmp_path: Path) -> None:
    draw = draw_of(tmp_path, sampling_rate=0.3)
    dry = dry_run(draw, tmp_path / "samples.parquet")
    refine(draw, "refined", LocalEngine(1), silent)
    written = summarise_selection(draw, tmp_path / "samples.parquet")
    assert dry.parts == written.parts
    assert [part.num_samples for part in dry.parts] == np.bincount(facts.part).tolist()
    assert [part.num_kept for part in dry.parts] == [int(0.3 * size + 0.5) for size in np.bincount(facts.part)]
    assert dry_run(draw_of(tmp_path, within="shard"), tmp_path / "samples.parquet").parts == []


@pytest.mark.parametrize("within", ["part", "shard"])
def test_kept_batches_stay_together_and_are_the_steps(facts: Facts, tmp_path: Path, within: str) -> None:
    draw = draw_of(tmp_path, policy="loss_batch", keep_batches=True, within=within, sampling_rate=0.33)
    refine(draw, "refined", LocalEngine(1), silent)
    count = mix_selection(tmp_path / "2" / "mix.parquet", draw, tmp_path / "samples.parquet")
    shards, samples = Mix(tmp_path / "2" / "mix.parquet").read(0, count)
    rows = {
        (shard, sample)
        for shard in range(SHARDS)
        for sample, kept in read_rows(selection_path(draw.target, shard), "sample", "kept")
        if kept
    }
    assert set(zip(shards.tolist(), samples.tolist(), strict=True)) == rows
    number = shards * SIZE + samples
    batches = facts.batches()[number] if within == "part" else (shards << 32) + samples // BATCH
    sizes = Counter(batches.tolist())
    whole = [name for name, size in sizes.items() if size == BATCH]
    steps = batches[: BATCH * len(whole)].reshape(-1, BATCH)
    assert len(whole) > 25
    assert (steps == steps[:, :1]).all()
    assert set(steps[:, 0].tolist()) == set(whole)
    # In random order, and the shorter ones each in one piece behind them.
    assert abs(np.corrcoef(steps[:, 0], np.arange(len(steps)))[0, 1]) < 0.5
    rest = batches[BATCH * len(whole) :]
    assert len(rest) > 0
    assert (np.diff(rest) != 0).sum() + 1 == len(set(rest.tolist()))
