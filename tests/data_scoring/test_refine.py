"""The draw against exhaustively computed probabilities of drawing without replacement."""

from itertools import permutations
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import chisquare

from data_scoring.config import RefineConfig
from data_scoring.mix import Mix
from data_scoring.progress import silent
from data_scoring.refine import mix_selection, num_kept, refine, selection_query
from data_scoring.scoring import losses_path, write_parquet
from tests.conftest import read_rows

LOSSES = [0.3, 1.0, 1.1, 2.5, 3.0]
SEEDS = 4_000


def exact_probabilities(weights: np.ndarray, kept: int) -> dict[frozenset[int], float]:
    """Return each set's probability under sequential draws without replacement, by adding up all orders."""
    probabilities: dict[frozenset[int], float] = {}
    for order in permutations(range(len(weights)), kept):
        probability, left = 1.0, weights.sum()
        for index in order:
            probability *= weights[index] / left
            left -= weights[index]
        probabilities[frozenset(order)] = probabilities.get(frozenset(order), 0.0) + probability
    return probabilities


def drawn_sets(config: RefineConfig) -> dict[frozenset[int], int]:
    with duckdb.connect() as connection:
        connection.execute("create table losses (sample int, loss float)")
        connection.executemany("insert into losses values (?, ?)", list(enumerate(LOSSES)))
        counts: dict[frozenset[int], int] = {}
        for seed in range(SEEDS):
            query = selection_query("losses", len(LOSSES), config, seed, 2, seed % 7)
            chosen = frozenset(row[0] for row in connection.sql(query).fetchall() if row[2])
            counts[chosen] = counts.get(chosen, 0) + 1
    return counts


@pytest.mark.parametrize(
    ("policy", "temperature", "rate"), [("loss", 1.0, 0.4), ("loss", 2.0, 0.6), ("random", 1.0, 0.4)]
)
def test_frequencies_match_exhaustive_probabilities(policy: str, temperature: float, rate: float) -> None:
    config = RefineConfig(policy=policy, temperature=temperature, sampling_rate=rate)
    weights = np.exp(np.array(LOSSES) / temperature) if policy == "loss" else np.ones(len(LOSSES))
    expected = exact_probabilities(weights, num_kept(len(LOSSES), config))
    counts = drawn_sets(config)
    assert counts.keys() <= expected.keys()
    observed = [counts.get(chosen, 0) for chosen in expected]
    assert chisquare(observed, np.array(list(expected.values())) * SEEDS).pvalue > 1e-3


def test_the_hash_has_not_changed() -> None:
    """A DuckDB whose hash differs draws other samples from the same seed: then the format has a new version."""
    with duckdb.connect() as connection:
        connection.execute("create table losses as select range::int as sample, 1::float as loss from range(20)")
        config = RefineConfig(policy="random", sampling_rate=0.3)
        rows = connection.sql(selection_query("losses", 20, config, 1, 2, 3)).fetchall()
    assert [row[0] for row in rows if row[2]] == [3, 5, 7, 10, 16, 18]


def write_losses(folder: Path, shard: int, losses: np.ndarray, order: np.ndarray) -> None:
    samples = np.arange(len(losses), dtype=np.int32)
    table = pa.table({"sample": samples[order], "num_tokens": samples[order], "loss": losses.astype(np.float32)[order]})
    write_parquet(losses_path(folder, shard), table, "scored")


def test_the_draw_does_not_depend_on_row_order_and_is_exact_in_number(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    losses = [generator.normal(3, 0.6, size) for size in (1001, 1000, 1)]
    for name in ("sorted", "shuffled"):
        for shard, values in enumerate(losses):
            order = np.arange(len(values)) if name == "sorted" else generator.permutation(len(values))
            write_losses(tmp_path / name, shard, values, order)
        refine(tmp_path / name, tmp_path / name / "2", RefineConfig(), 7, 2, [1001, 1000, 1], "refined", silent)
    for shard, count in enumerate((501, 500, 1)):
        rows = [
            read_rows(
                tmp_path / name / "2" / "selection" / f"shard={shard:04d}.parquet", "sample", "loss", "kept", "reason"
            )
            for name in ("sorted", "shuffled")
        ]
        assert rows[0] == rows[1]
        assert sum(row[2] for row in rows[0]) == count
        assert {row[3] for row in rows[0]} <= {"drawn by loss", "not drawn"}
    kept = [row[1] for row in rows_of(tmp_path) if row[2]]
    dropped = [row[1] for row in rows_of(tmp_path) if not row[2]]
    assert np.mean(kept) > np.mean(dropped)


def rows_of(folder: Path) -> list[tuple]:
    return read_rows(folder / "sorted" / "2" / "selection" / "shard=0000.parquet", "sample", "loss", "kept")


def test_everything_is_kept_by_policy_all(tmp_path: Path) -> None:
    write_losses(tmp_path, 0, np.ones(5), np.arange(5))
    refine(tmp_path, tmp_path / "2", RefineConfig(policy="all"), 7, 2, [5], "refined", silent)
    assert all(row[0] for row in read_rows(tmp_path / "2" / "selection", "kept"))


def test_the_mix_of_a_selection_ends_at_the_limit_of_tokens(tmp_path: Path) -> None:
    write_losses(tmp_path, 0, np.arange(6.0), np.arange(6))
    refine(tmp_path, tmp_path / "2", RefineConfig(), 7, 2, [6], "refined", silent)
    lengths = pa.table({"shard": [0] * 6, "sample": range(6), "num_tokens": [10, 11, 12, 13, 14, 15]})
    write_parquet(tmp_path / "samples.parquet", lengths, "prepared")

    def order(max_tokens: int | None) -> list[int]:
        path = tmp_path / "mix.parquet"
        assert mix_selection(path, tmp_path / "2", tmp_path / "samples.parquet", 7, 2, max_tokens) == len(Mix(path))
        return Mix(path).read(0, len(Mix(path)))[1].tolist()

    first, second, third = order(None)
    assert order(10 + first + 10 + second) == [first, second]
    assert order(10 + first + 10 + second - 1) == [first]
    assert order(30 + first + second + third) == [first, second, third]


def test_missing_and_incomplete_losses_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"shard=0000\.parquet: no such file; score the round"):
        refine(tmp_path, tmp_path / "2", RefineConfig(), 7, 2, [5], "refined", silent)
    write_losses(tmp_path, 0, np.ones(4), np.arange(4))
    with pytest.raises(ValueError, match=r"\(4, 4\) rows and losses where the shard has 5 samples"):
        refine(tmp_path, tmp_path / "2", RefineConfig(), 7, 2, [5], "refined", silent)
    losses_path(tmp_path, 0).write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match=r"shard=0000\.parquet: cannot be read"):
        refine(tmp_path, tmp_path / "2", RefineConfig(), 7, 2, [5], "refined", silent)
    assert list((tmp_path / "2" / "selection").iterdir()) == []
