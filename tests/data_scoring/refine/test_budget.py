"""Cheaper ways to score: what is measured of them, which is taken, and losses that training left."""

from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import spearmanr

from data_scoring.base.parquet import write_parquet
from data_scoring.base.progress import silent
from data_scoring.corpus.corpus import Corpus
from data_scoring.losses.calibration import calibrate, candidate_prefixes, draw_calibration_set
from data_scoring.losses.seen_losses import is_everything_seen, write_seen_losses
from data_scoring.losses.shard_scoring import Block, losses_path
from data_scoring.refine.budget import Candidate, choose, drawn, measure_candidates, scoring_cost, spearman
from data_scoring.refine.candidates import Draw, Limits
from data_scoring.refine.refine_config import RefineConfig
from data_scoring.refine.selection import Selection
from tests.conftest import ORIGIN, read_rows
from tests.data_scoring.losses.test_shard_scoring import FakeScorer


@pytest.mark.parametrize("levels", [3, 50, 1000])
def test_the_correlation_is_scipy_s_with_ties_too(levels: int) -> None:
    generator = np.random.default_rng(levels)
    first = generator.integers(0, levels, 400)
    second = first + generator.integers(0, levels, 400)
    with duckdb.connect() as connection:
        connection.execute('create table calibration (a double, "prefix:4" double, constant double)')
        connection.executemany(
            "insert into calibration values (?, ?, 1)", list(zip(first.tolist(), second.tolist(), strict=True))
        )
        assert spearman(connection, "a", "prefix:4") == pytest.approx(spearmanr(first, second).statistic)
        assert spearman(connection, "a", "constant") is None


def test_the_draw_is_refining_s_own(tmp_path: Path) -> None:
    losses = np.sin(np.arange(101)).astype(np.float32)
    table = {"sample": np.arange(101, dtype=np.int32), "num_tokens": np.ones(101, np.int32), "source": ["a"] * 101}
    write_parquet(losses_path(tmp_path / "1", 3), pa.table({**table, "loss": losses}), "scored")
    config = RefineConfig(sampling_rate=0.3, temperature=0.5)
    with duckdb.connect() as connection:
        connection.execute(
            "create table calibration as "
            "select 3 as shard, range::int as sample, sin(range)::float as loss from range(101)"
        )
        query = Selection(connection, Draw(tmp_path, 2, config, 7, [0, 0, 0, 101]), Limits(), None).query(3)
        kept = {(shard, sample) for shard, sample, _, is_kept, *_ in connection.sql(query).fetchall() if is_kept}
        assert drawn(connection, "loss", 0.3, 7, 2, temperature=0.5) == kept


def test_the_calibration_set_is_spread_in_proportion() -> None:
    sizes = [1000, 500, 0, 3]
    shards, samples = draw_calibration_set(sizes, 150, 5, 1)
    assert np.bincount(shards, minlength=4).tolist() in ([100, 50, 0, 0], [100, 49, 0, 1])
    assert len(set(zip(shards.tolist(), samples.tolist(), strict=True))) == 150
    assert all(sample < sizes[shard] for shard, sample in zip(shards, samples, strict=True))
    again, other = draw_calibration_set(sizes, 150, 5, 1), draw_calibration_set(sizes, 150, 5, 2)
    assert (again[1] == samples).all()
    assert not (other[1] == samples).all()
    shards, samples = draw_calibration_set(sizes, 10_000, 5, 1)
    assert len(set(zip(shards.tolist(), samples.tolist(), strict=True))) == 1503


class PrefixScorer(FakeScorer):
    """Takes the mean of the first tokens for each candidate prefix, and of all."""

    def score(self, block: Block, share: object) -> np.ndarray:
        batch = self.read(block)
        columns = [
            [row[1 : 1 + min(count, prefix)].mean() for row, count in zip(batch.tokens, batch.num_tokens, strict=True)]
            for prefix in (*candidate_prefixes(self.corpus.seq_length), self.corpus.seq_length)
        ]
        return np.array(columns, np.float32).T


def write_seen(folder: Path, step: int, rows: list[tuple[int, int, float]]) -> None:
    shards, samples, losses = (list(column) for column in zip(*rows, strict=True))
    table = pa.table(
        {
            "step": pa.array([step] * len(rows), pa.int32()),
            "shard": pa.array(shards, pa.int32()),
            "sample": pa.array(samples, pa.int32()),
            "loss": pa.array(losses, pa.float32()),
        }
    )
    write_parquet(folder / "seen" / f"step={step:08d}-replica=0000.parquet", table, "f")


def everything(corpus: Corpus) -> list[tuple[int, int, float]]:
    return [
        (shard, sample, float(shard + sample / 1000))
        for shard in range(corpus.num_shards)
        for sample in range(corpus.num_samples(shard))
    ]


def test_candidates_are_measured_and_the_cheapest_that_will_do_is_taken(tiny_corpus: Corpus, tmp_path: Path) -> None:
    folder = tmp_path / "1"
    scorer = PrefixScorer(tiny_corpus, 8)
    sizes = [tiny_corpus.num_samples(shard) for shard in range(tiny_corpus.num_shards)]
    calibrate(tiny_corpus, folder, draw_calibration_set(sizes, 60, 0, 1), scorer, "f", ORIGIN, silent)
    rows = read_rows(folder / "calibration.parquet", "num_tokens", "prefix:4", "prefix:8", "prefix:16", "loss")
    write_seen(folder, 1, everything(tiny_corpus)[:-1])
    measured = measure_candidates(tiny_corpus, folder, 1, RefineConfig(), 0)
    assert [candidate.name for candidate in measured] == ["prefix:4", "prefix:8", "prefix:16", "full"]
    for place, candidate in enumerate(measured, start=1):
        expected = spearmanr([row[place] for row in rows], [row[4] for row in rows]).statistic
        assert candidate.correlation == pytest.approx(expected)
        assert candidate.overlap is not None and 0 < candidate.overlap <= 1
    lengths = np.concatenate([tiny_corpus.lengths(shard) for shard in range(tiny_corpus.num_shards)])
    assert [candidate.cost_tokens for candidate in measured] == [
        round(np.minimum(lengths, longest).sum() / 3) for longest in (4, 8, 16, 32)
    ]
    assert (measured[3].correlation, measured[3].overlap) == (1.0, 1.0)
    [other] = {
        (candidate.sampling_rate, candidate.temperature)
        for candidate in measure_candidates(tiny_corpus, folder, 1, RefineConfig(sampling_rate=0.1, temperature=2), 0)
    }
    assert other == (0.1, 2.0)
    write_seen(folder, 2, everything(tiny_corpus)[-1:])
    assert measure_candidates(tiny_corpus, folder, 1, RefineConfig(), 0)[0].name == "seen"


def test_the_cheapest_that_correlates_is_chosen_and_full_in_the_end() -> None:
    candidates = [
        Candidate("seen", 0, 0.7), Candidate("prefix:8", 10, None), Candidate("prefix:16", 20, 0.95),
        Candidate("full", 40, 1.0),
    ]  # fmt: skip
    chosen = [choose(candidates, least).name for least in (-1.0, 0.7, 0.9, 0.99, 1.0)]
    assert chosen == ["seen", "seen", "prefix:16", "full", "full"]
    assert choose([Candidate("full", 40, None)], 0.9).name == "full"


def test_seen_losses_are_those_of_the_last_time(tiny_corpus: Corpus, tmp_path: Path) -> None:
    rows = everything(tiny_corpus)
    write_seen(tmp_path / "1", 1, rows[:100])
    write_seen(tmp_path / "1", 30, rows[100:])
    again = [(shard, sample, loss + 5) for shard, sample, loss in rows[::2]]
    write_seen(tmp_path / "2", 1, again)
    write_seen(tmp_path / "3", 1, [(shard, sample, 99.0) for shard, sample, _ in rows])
    done: list[int] = []
    write_seen_losses(tiny_corpus, tmp_path / "2", 2, "f", ORIGIN, done.append)
    assert done == [1, 2, 3]
    expected = {row[:2]: row[2] for row in rows} | {row[:2]: row[2] for row in again}
    for shard in range(tiny_corpus.num_shards):
        found = read_rows(losses_path(tmp_path / "2", shard), "sample", "num_tokens", "loss")
        assert [row[0] for row in found] == list(range(tiny_corpus.num_samples(shard)))
        assert [row[1] for row in found] == tiny_corpus.lengths(shard).tolist()
        np.testing.assert_allclose([row[2] for row in found], [expected[shard, row[0]] for row in found])
    written = losses_path(tmp_path / "2", 0).stat().st_mtime_ns
    write_seen_losses(tiny_corpus, tmp_path / "2", 2, "f", ORIGIN, done.append)
    assert losses_path(tmp_path / "2", 0).stat().st_mtime_ns == written


def test_a_sample_that_was_never_seen_is_named(tiny_corpus: Corpus, tmp_path: Path) -> None:
    rows = [row for row in everything(tiny_corpus) if row[:2] not in ((1, 5), (1, 6))]
    assert not is_everything_seen(tiny_corpus, tmp_path, 1)
    write_seen(tmp_path / "1", 1, rows)
    assert not is_everything_seen(tiny_corpus, tmp_path, 1)
    with pytest.raises(ValueError, match=r"score.budget: seen: 2 of the \d+ samples of shard 1 .*first is sample 5\)"):
        write_seen_losses(tiny_corpus, tmp_path / "1", 1, "f", ORIGIN, lambda done: None)
    assert losses_path(tmp_path / "1", 0).exists()
    assert scoring_cost(tiny_corpus, "seen") == 0
