"""The draw against exhaustively computed probabilities of drawing without replacement."""

from collections import Counter
from itertools import permutations
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import chisquare

from data_scoring.base.engine import LocalEngine
from data_scoring.base.parquet import parquet_fingerprint, write_parquet
from data_scoring.base.progress import silent
from data_scoring.losses.shard_scoring import losses_path
from data_scoring.refine.candidates import Draw, Limits, candidates_query
from data_scoring.refine.draw import num_kept
from data_scoring.refine.refine_config import RefineConfig, SourceRule
from data_scoring.refine.refine_shards import mix_all, mix_selection, refine, selection_path
from data_scoring.refine.selection import Selection
from data_scoring.refine.training_mix import Mix
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


@pytest.mark.parametrize(
    ("policy", "temperature", "rate"), [("loss", 1.0, 0.4), ("loss", 2.0, 0.6), ("random", None, 0.4)]
)
def test_frequencies_match_exhaustive_probabilities(
    policy: str, temperature: float | None, rate: float, tmp_path: Path
) -> None:
    config = RefineConfig(policy=policy, temperature=temperature, sampling_rate=rate)
    # The same five samples again and again, each time with the random numbers of another seed.
    trials = np.repeat(np.arange(SEEDS), len(LOSSES))
    write_losses(tmp_path / "1", 0, np.tile(LOSSES, SEEDS), samples=np.tile(np.arange(5), SEEDS), trial=trials)
    draw = Draw(tmp_path, 2, config, "trial", [len(trials)])  # type: ignore[arg-type]
    with duckdb.connect() as connection:
        keys = connection.sql(f"select key from ({candidates_query(draw, Limits(), 0)})").fetchnumpy()["key"]
    kept = num_kept(len(LOSSES), rate)
    chosen = np.argsort(-keys.reshape(SEEDS, len(LOSSES)), axis=1)[:, :kept]
    counts = Counter(map(frozenset, chosen.tolist()))
    weights = np.exp(np.array(LOSSES) / (temperature or 1)) if policy == "loss" else np.ones(len(LOSSES))
    expected = exact_probabilities(weights, kept)
    assert counts.keys() <= expected.keys()
    observed = [counts[chosen] for chosen in expected]
    assert chisquare(observed, np.array(list(expected.values())) * SEEDS).pvalue > 1e-3


def test_the_hash_has_not_changed(tmp_path: Path) -> None:
    """A DuckDB whose hash differs draws other samples from the same seed: then the format has a new version."""
    write_losses(tmp_path / "1", 3, np.ones(20))
    draw = Draw(tmp_path, 2, RefineConfig(policy="random", sampling_rate=0.3), 1, [0, 0, 0, 20])
    with duckdb.connect() as connection:
        rows = connection.sql(Selection(connection, draw, Limits(), None).query(3)).fetchall()
    assert [sample for shard, sample, _, kept, _ in rows if kept and shard == 3] == [3, 5, 7, 10, 16, 18]


def write_losses(folder: Path, number: int, losses: np.ndarray, samples: np.ndarray | None = None, **more: Any) -> None:
    samples = np.arange(len(losses)) if samples is None else samples
    table = {
        "sample": samples.astype(np.int32),
        "num_tokens": np.full(len(losses), 32, np.int32),
        "source": np.where(samples % 3, "a", "b"),
        "loss": losses.astype(np.float32),
        **more,
    }
    write_parquet(losses_path(folder, number), pa.table(table), "scored")


def test_the_draw_does_not_depend_on_row_order_and_is_exact_in_number(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    losses = [generator.normal(3, 0.6, size) for size in (1001, 1000, 1)]
    for name in ("sorted", "shuffled"):
        for shard, values in enumerate(losses):
            order = np.arange(len(values)) if name == "sorted" else generator.permutation(len(values))
            # Files of before 0.12 have no column `shard`.
            more = {"shard": np.full(len(values), shard, np.int32)} if name == "sorted" else {}
            write_losses(tmp_path / name / "1", shard, values[order], order, **more)
        refine(Draw(tmp_path / name, 2, RefineConfig(), 7, [1001, 1000, 1]), "refined", LocalEngine(1), silent)
        assert not (tmp_path / name / "2" / ".spill").exists()
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
    # Any reader knows the shard.
    paths = sorted((tmp_path / "shuffled" / "2" / "selection").glob("*.parquet"))
    selection = pa.concat_tables(pq.read_table(path) for path in paths)
    assert {*zip(selection["shard"].to_pylist(), selection["sample"].to_pylist(), strict=True)} == {
        (shard, sample) for shard, values in enumerate(losses) for sample in range(len(values))
    }
    chosen = read_rows(tmp_path / "sorted" / "2" / "selection" / "shard=0000.parquet", "kept", "loss")
    assert np.mean([loss for kept, loss in chosen if kept]) > np.mean([loss for kept, loss in chosen if not kept])


def test_a_rerun_makes_only_what_is_missing(tmp_path: Path) -> None:
    for shard in range(3):
        write_losses(tmp_path / "1", shard, np.linspace(1, 3, 50))
    draw = Draw(tmp_path, 2, RefineConfig(), 7, [50, 50, 50])
    refine(draw, "refined", LocalEngine(1), silent)
    paths = [selection_path(draw.target, shard) for shard in range(3)]
    before = [path.read_bytes() for path in paths]
    paths[1].unlink()
    written = [path.stat().st_mtime_ns for path in (paths[0], paths[2])]
    refine(draw, "refined", LocalEngine(1), silent)
    assert [path.stat().st_mtime_ns for path in (paths[0], paths[2])] == written
    assert [path.read_bytes() for path in paths] == before
    refine(draw, "of other inputs", LocalEngine(1), silent)
    assert parquet_fingerprint(paths[0]) == "of other inputs"


def test_the_mix_of_a_selection_ends_at_the_limit_of_tokens(tmp_path: Path) -> None:
    write_losses(tmp_path / "1", 0, np.arange(6.0))
    refine(Draw(tmp_path, 2, RefineConfig(), 7, [6]), "refined", LocalEngine(1), silent)
    lengths = pa.table({"shard": [0] * 6, "sample": range(6), "num_tokens": [10, 11, 12, 13, 14, 15]})
    write_parquet(tmp_path / "samples.parquet", lengths, "prepared")

    def order(max_tokens: int | None) -> list[int]:
        path = tmp_path / "mix.parquet"
        draw = Draw(tmp_path, 2, RefineConfig(max_tokens=max_tokens), 7, [6])
        assert mix_selection(path, draw, tmp_path / "samples.parquet") == len(Mix(path))
        return Mix(path).read(0, len(Mix(path)))[1].tolist()

    first, second, third = order(None)
    assert order(10 + first + 10 + second) == [first, second]
    assert order(10 + first + 10 + second - 1) == [first]
    assert order(30 + first + second + third) == [first, second, third]


def test_the_first_mix_has_no_source_that_joins_later(tmp_path: Path) -> None:
    columns = {"shard": [0, 0, 1, 1], "sample": [0, 1, 0, 1], "source": ["a", "b", "a", "b"], "num_tokens": [9] * 4}
    write_parquet(tmp_path / "samples.parquet", pa.table(columns), "prepared")
    config = RefineConfig(sources=(SourceRule(name="b", from_round=2),))
    assert mix_all(tmp_path / "mix.parquet", tmp_path / "samples.parquet", 7, config) == 2
    assert read_rows(tmp_path / "mix.parquet", "shard", "sample") == [(0, 0), (1, 0)]


def test_the_first_mix_has_no_contaminated_sample(tmp_path: Path) -> None:
    columns = {"shard": [0, 0, 1, 1], "sample": [0, 1, 0, 1], "source": ["a", "b", "a", "b"], "num_tokens": [9] * 4}
    write_parquet(tmp_path / "samples.parquet", pa.table(columns), "prepared")
    # One sample overlaps with two items.
    listed = {"task": ["t"] * 3, "shard": [0, 0, 1], "sample": [1, 1, 0], "source": ["b", "b", "a"]}
    write_parquet(tmp_path / "listed.parquet", pa.table(listed), "listed")
    joined, late = RefineConfig(), RefineConfig(sources=(SourceRule(name="b", from_round=2),))
    for config, max_tokens, expected in (
        (joined, None, [(0, 0), (1, 1)]), (joined, 18, [(0, 0), (1, 1)]), (late, None, [(0, 0)]),
    ):  # fmt: skip
        path = tmp_path / "mix.parquet"
        count = mix_all(path, tmp_path / "samples.parquet", 7, config, max_tokens, tmp_path / "listed.parquet")
        assert count == len(expected)
        assert read_rows(path, "shard", "sample") == expected


@pytest.mark.parametrize("policy", ["loss", "all", "top"])
def test_a_later_mix_has_no_contaminated_sample(policy: str, tmp_path: Path) -> None:
    for shard in range(2):
        write_losses(tmp_path / "1", shard, np.linspace(1, 3, 60))
    # Of source b, which joins in round 2 with every third sample, and of a; the hardest of each, and some twice.
    left_out = {(0, 57), (0, 59), (0, 58), (1, 0), (1, 1)}
    rows = [*left_out, (0, 59), (0, 57)]
    listed = pa.table({"shard": [row[0] for row in rows], "sample": [row[1] for row in rows]})
    write_parquet(tmp_path / "listed.parquet", listed, "listed")
    config = RefineConfig(policy=policy, sources=(SourceRule(name="b", from_round=2),), max_tokens=32 * 30)
    draw = Draw(tmp_path, 2, config, 7, [60, 60], contaminated=tmp_path / "listed.parquet")
    refine(draw, "refined", LocalEngine(1), silent)
    selected = [
        (shard, *row)
        for shard in range(2)
        for row in read_rows(selection_path(draw.target, shard), "sample", "kept", "reason")
    ]
    assert {row[:2] for row in selected if row[3] == "contaminated"} == left_out
    assert not any(row[2] for row in selected if row[:2] in left_out)
    # The 20 samples of b in each shard join, and of the 40 others as many are kept as of all of them would be.
    expected = {"all": (40 - 2 + 20 - 1, 40 - 1 + 20 - 1), "loss": (39, 39), "top": (39, 39)}[policy]
    assert tuple(sum(row[2] for row in selected if row[0] == shard) for shard in range(2)) == expected
    columns = {"shard": [0] * 60 + [1] * 60, "sample": [*range(60)] * 2, "num_tokens": [32] * 120}
    write_parquet(tmp_path / "samples.parquet", pa.table(columns), "prepared")
    assert mix_selection(tmp_path / "mix.parquet", draw, tmp_path / "samples.parquet") == 30
    assert not left_out & set(read_rows(tmp_path / "mix.parquet", "shard", "sample"))


def test_the_first_mix_ends_at_its_tokens(tmp_path: Path) -> None:
    lengths = pa.table({"shard": [0] * 6, "sample": range(6), "num_tokens": [10, 11, 12, 13, 14, 15]})
    write_parquet(tmp_path / "samples.parquet", lengths, "prepared")

    def order(max_tokens: int | None) -> list[int]:
        count = mix_all(tmp_path / "mix.parquet", tmp_path / "samples.parquet", 7, max_tokens=max_tokens)
        return Mix(tmp_path / "mix.parquet").read(0, count)[1].tolist()

    first, second, *_ = whole = order(None)
    assert sorted(whole) == list(range(6))
    assert order(10 + first + 10 + second) == [first, second]
    assert order(10 + first + 10 + second - 1) == [first]
    with pytest.raises(ValueError, match=r"train\.max_tokens: 3 is less than the tokens of the mix's first sample"):
        order(3)


def test_missing_and_incomplete_losses_are_named(tmp_path: Path) -> None:
    draw = Draw(tmp_path, 2, RefineConfig(), 7, [5])
    with pytest.raises(ValueError, match=r"shard=0000\.parquet: no such file; score the round"):
        refine(draw, "refined", LocalEngine(1), silent)
    write_losses(tmp_path / "1", 0, np.ones(4))
    with pytest.raises(ValueError, match=r"\(4, 4\) rows and losses, but the shard has 5 samples"):
        refine(draw, "refined", LocalEngine(1), silent)
    losses_path(tmp_path / "1", 0).write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match=r"shard=0000\.parquet: cannot be read"):
        refine(draw, "refined", LocalEngine(1), silent)
    assert list((tmp_path / "2" / "selection").iterdir()) == []
