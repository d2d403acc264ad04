"""What is kept, against a second implementation that sorts everything in NumPy; guards, rules and what is refused."""

from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from data_scoring.base.engine import LocalEngine
from data_scoring.base.parquet import write_parquet
from data_scoring.base.sql import random_bits
from data_scoring.losses.shard_scoring import losses_path
from data_scoring.refine import bars, selection
from data_scoring.refine.candidates import Draw, Limits, find_limits
from data_scoring.refine.policies import POLICIES
from data_scoring.refine.refine_config import RefineConfig, SourceRule
from data_scoring.refine.selection import Selection

SIZE = 3_000
SEED = 11


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds that were trained and scored: 2 shards of 3,000 samples, of sources a, b (a tenth) and c."""
    folder = tmp_path_factory.mktemp("rounds")
    generator = np.random.default_rng(1)
    seen: dict[int, list[tuple[np.ndarray, ...]]] = {1: [], 2: []}
    for shard in range(2):
        sources = generator.choice(["a", "b", "c"], SIZE, p=[0.6, 0.1, 0.3])
        losses = generator.normal(3, 0.6, SIZE) + (sources == "b")
        losses[:3] = 12.0
        table = {
            "shard": np.full(SIZE, shard, np.int32),
            "sample": np.arange(SIZE, dtype=np.int32),
            "num_tokens": generator.integers(1, 33, SIZE).astype(np.int32),
            "source": sources,
            "loss": losses.astype(np.float32),
        }
        write_parquet(losses_path(folder / "2", shard), pa.table(table), "scored")
        reference = {**table, "loss": (losses - generator.normal(0.5, 0.3, SIZE)).astype(np.float32)}
        write_parquet(losses_path(folder / "reference", shard), pa.table(reference), "scored")
        # Round 1 trained on everything, round 2 on the even samples.
        for number, samples in ((1, np.arange(SIZE)), (2, np.arange(0, SIZE, 2))):
            seen[number].append((np.full(len(samples), shard), samples, generator.normal(3, 0.5, len(samples))))
    for number, parts in seen.items():
        shards, samples, losses = (np.concatenate(column) for column in zip(*parts, strict=True))
        columns = {"shard": shards.astype(np.int32), "sample": samples.astype(np.int32)}
        write_parquet(folder / str(number) / "mix.parquet", pa.table(columns), "mixed")
        table = pa.table({**columns, "step": columns["sample"], "loss": losses.astype(np.float32)})
        write_parquet(folder / str(number) / "seen" / "step=00000001-replica=0000.parquet", table, "seen")
    near = {"shard": np.array([1, 1], np.int32), "sample": np.array([7, 9], np.int32)}
    write_parquet(folder / "near.parquet", pa.table(near), "near")
    return folder


def draw_of(rounds: Path, **config: Any) -> Draw:
    config = {"outlier_z": None, "batch_size": 16, **config}
    return Draw(rounds, 3, RefineConfig(**config), SEED, [SIZE, SIZE], rounds / "near.parquet")


def selected(draw: Draw, shard: int = 1) -> dict[str, np.ndarray]:
    limits = find_limits(draw, LocalEngine(1), draw.rounds)
    with duckdb.connect() as connection:
        rows = connection.sql(Selection(connection, draw, limits, None).query(shard)).fetchnumpy()
    assert (rows["sample"] == np.arange(SIZE)).all()
    return rows


def known(rounds: Path, shard: int = 1) -> dict[str, np.ndarray]:
    """Return what there is to know of each sample, joined in NumPy."""
    with duckdb.connect() as connection:
        rows = connection.sql(f"from read_parquet('{losses_path(rounds / '2', shard)}')").fetchnumpy()
        reference = connection.sql(f"from read_parquet('{losses_path(rounds / 'reference', shard)}')").fetchnumpy()
        seen = np.full(SIZE, np.nan)
        for number in (1, 2):
            part = connection.sql(
                f"from read_parquet('{rounds / str(number)}/seen/*') where shard = {shard}"
            ).fetchnumpy()
            seen[part["sample"]] = part["loss"]
        bits = [
            connection.sql(f"select {random_bits(SEED, 3, shard, unit)} as b from range({SIZE})").fetchnumpy()["b"]
            for unit in ("range::int", "(range // 16)::int")
        ]
    return {
        **rows, "reference": reference["loss"].astype(float), "seen": seen, "loss": rows["loss"].astype(float),
        "bits": bits[0], "batch_bits": bits[1],
    }  # fmt: skip


def gumbel(bits: np.ndarray) -> np.ndarray:
    return -np.log(-np.log(((bits >> np.uint64(12)).astype(float) + 0.5) / 2.0**52))


def expected_keys(policy: str, temperature: float, facts: dict[str, np.ndarray]) -> np.ndarray:
    loss, tokens = facts["loss"], facts["num_tokens"].astype(float)
    batches = np.arange(SIZE) // 16
    scores = {
        "loss": loss, "top": loss, "random": np.zeros(SIZE), "all": np.zeros(SIZE),
        "forgetting": loss - facts["seen"], "excess": loss - facts["reference"],
        "loss_batch": (np.bincount(batches, loss * tokens) / np.bincount(batches, tokens))[batches],
        "sql": loss - 0.5 * facts["seen"] + (facts["source"] == "b"),
    }[policy]  # fmt: skip
    if temperature == 0:
        return scores
    return scores / temperature + gumbel(facts["batch_bits" if policy == "loss_batch" else "bits"])


def expected_kept(
    key: np.ndarray, wanted: int, floor: np.ndarray, ceiling: np.ndarray, groups: np.ndarray
) -> np.ndarray:
    """Return what is kept: every group's first up to its floor, then the highest of what its ceiling leaves."""
    order = np.lexsort((np.arange(SIZE), -key))
    rank = np.empty(SIZE, int)
    for group in np.unique(groups):
        mine = order[groups[order] == group]
        rank[mine] = np.arange(1, len(mine) + 1)
    kept = rank <= floor
    contest = [sample for sample in order if not kept[sample] and rank[sample] <= ceiling[sample]]
    kept[contest[: wanted - kept.sum()]] = True
    return kept


DRAWS: list[tuple[str, float | None]] = [
    ("loss", None), ("loss", 0.25), ("loss_batch", None), ("top", None), ("top", 0.5), ("forgetting", None),
    ("excess", 0.5), ("random", None), ("sql", None), ("sql", 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("policy", "temperature"), DRAWS)
@pytest.mark.parametrize("is_ruled", [False, True])
def test_every_policy_keeps_exactly_the_highest(
    rounds: Path, policy: str, temperature: float | None, is_ruled: bool
) -> None:
    rules = (SourceRule(name="a", at_most=0.25), SourceRule(name="b", at_least=0.9), SourceRule(name="c", at_most=1))
    draw = draw_of(
        rounds, policy=policy, temperature=temperature, sampling_rate=0.3, reference=str(rounds / "reference"),
        sql="loss - 0.5 * seen_loss + (source = 'b')::int", sources=rules if is_ruled else (),
    )  # fmt: skip
    rows, facts = selected(draw), known(rounds)
    key = expected_keys(policy, draw.config.draw_temperature, facts)
    groups = facts["source"].astype(str) if is_ruled else np.full(SIZE, "")
    floor, ceiling = np.zeros(SIZE), np.full(SIZE, SIZE)
    if is_ruled:
        floor[groups == "b"] = int(0.9 * (groups == "b").sum())
        ceiling[groups == "a"] = int(0.25 * (groups == "a").sum() + 0.5)
    kept = expected_kept(key, 900, floor, ceiling, groups)
    assert kept.sum() == 900
    assert (rows["kept"] == kept).all()
    reasons = set(rows["reason"][rows["kept"]])
    assert reasons <= {POLICIES[policy].reason, selection.FLOOR}
    assert set(rows["reason"][~rows["kept"]]) <= {selection.NOT_DRAWN, selection.CEILING}


def test_buckets_of_any_width_give_the_same(rounds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = draw_of(rounds, sources=(SourceRule(name="b", at_least=0.8), SourceRule(name="c", at_most=0.4)))
    fine = selected(draw)
    monkeypatch.setattr(bars, "_NUM_BUCKETS", 3)
    coarse = selected(draw)
    assert (fine["kept"] == coarse["kept"]).all()


def test_the_band_leaves_out_the_hardest_and_the_easiest(rounds: Path) -> None:
    rows = selected(draw_of(rounds, policy="band", sampling_rate=0.5, drop_hardest=0.2))
    order = np.argsort(-rows["loss"])
    # Which of two losses in the same 1/1024 nats is the harder one is not told.
    assert set(rows["reason"][order[:598]]) == {"among the hardest"}
    assert (rows["kept"].sum(), set(rows["reason"][rows["kept"]])) == (1500, {"in the band"})
    assert rows["kept"][order[602:2098]].all()


def test_outliers_are_put_aside_source_by_source(rounds: Path) -> None:
    draw = draw_of(rounds, outlier_z=6.0)
    rows, facts = selected(draw), known(rounds)
    both = [known(rounds, 0), facts]
    limits = {}
    for source in ("a", "b", "c"):
        losses = np.concatenate([each["loss"][each["source"] == source] for each in both])
        limits[source] = np.median(losses) + 6 * 1.4826 * np.median(abs(losses - np.median(losses)))
    assert find_limits(draw, LocalEngine(1), rounds).outlier == pytest.approx(limits, abs=0.02)
    assert np.flatnonzero(rows["reason"] == "outlier").tolist() == [0, 1, 2]
    # What is put aside counts as part of the shard: as many as ever are kept.
    assert rows["kept"].sum() == 1500


def test_guards_keep_samples_out_and_say_why(rounds: Path) -> None:
    rows, facts = selected(draw_of(rounds, near_duplicates=0.8, min_tokens=5, max_rounds=2)), known(rounds)
    short = facts["num_tokens"] < 5
    assert ((rows["reason"] == "too few tokens") == short).all()
    assert set(np.flatnonzero(rows["reason"] == "near duplicate")) == {7, 9} - set(np.flatnonzero(short))
    often = (np.arange(SIZE) % 2 == 0) & ~short
    assert ((rows["reason"] == "trained on often enough") == often).all()
    # Half the samples were in both rounds, and so fewer than half are left to be kept.
    left = ~short & ~often & ~np.isin(np.arange(SIZE), [7, 9])
    assert (rows["kept"] == left).all()


def test_a_source_joins_when_it_is_told_to(rounds: Path) -> None:
    facts = known(rounds)
    later = selected(draw_of(rounds, sources=(SourceRule(name="c", from_round=4),)))
    assert set(later["reason"][facts["source"] == "c"]) == {"its source joins later"}
    others = (facts["source"] != "c").sum()
    assert later["kept"].sum() == int(others / 2 + 0.5)
    now = selected(draw_of(rounds, sources=(SourceRule(name="c", from_round=3),)))
    assert now["kept"][facts["source"] == "c"].all()
    assert (now["kept"] == later["kept"])[facts["source"] != "c"].all()


def test_floors_above_the_sampling_rate_are_refused(rounds: Path) -> None:
    with pytest.raises(ValueError, match=r"floors \(at_least\) require \d+ samples of a shard .* keeps 300"):
        selected(draw_of(rounds, sampling_rate=0.1, sources=(SourceRule(name="a", at_least=0.5),)))


def test_a_score_that_is_no_number_is_refused(rounds: Path) -> None:
    with pytest.raises(ValueError, match=r"'ln\(loss - 3\)': the score of sample \d+ of shard 1 is not finite"):
        selected(draw_of(rounds, policy="sql", sql="ln(loss - 3)"))


def test_equal_scores_are_settled_at_random(rounds: Path) -> None:
    rows = selected(draw_of(rounds, policy="sql", sql="1", temperature=0, sampling_rate=0.5))
    assert rows["kept"].sum() == 1500
    assert 650 < rows["kept"][:1500].sum() < 850


def test_without_guards_there_are_no_limits(rounds: Path) -> None:
    assert find_limits(draw_of(rounds), LocalEngine(1), rounds) == Limits()


@pytest.mark.parametrize(
    "rules",
    [
        (SourceRule(name="b", at_most=0.0),),
        (SourceRule(name="a", at_most=0.0), SourceRule(name="b", at_most=0.0), SourceRule(name="c", at_most=0.0)),
        tuple(SourceRule(name=name, from_round=4) for name in "abc"),
        tuple(SourceRule(name=name, from_round=3) for name in "abc"),
    ],
)
def test_groups_of_which_nothing_or_everything_is_kept(rounds: Path, rules: tuple[SourceRule, ...]) -> None:
    rows, facts = selected(draw_of(rounds, sources=rules)), known(rounds)
    if rules[0].from_round == 3:
        assert rows["kept"].all()
    elif len(rules) == 1:
        assert rows["kept"].sum() == 1500
        assert not rows["kept"][facts["source"] == "b"].any()
    else:
        assert not rows["kept"].any()


def test_batches_without_a_candidate_are_on_record(rounds: Path) -> None:
    draw = draw_of(rounds, policy="loss_batch", min_tokens=33)
    rows = selected(draw)
    assert set(rows["reason"]) == {"too few tokens"}
    some = selected(draw_of(rounds, policy="loss_batch", min_tokens=32, sampling_rate=0.01))
    long = known(rounds)["num_tokens"] == 32
    assert ((some["reason"] == "too few tokens") == ~long).all()
    assert some["kept"].sum() == 30


def test_equal_losses_are_in_the_band(tmp_path: Path) -> None:
    table = {
        "sample": np.arange(SIZE, dtype=np.int32), "num_tokens": np.ones(SIZE, np.int32), "source": ["a"] * SIZE,
        "loss": np.full(SIZE, 3.0008, np.float32),
    }  # fmt: skip
    write_parquet(losses_path(tmp_path / "2", 0), pa.table(table), "scored")
    draw = Draw(tmp_path, 3, RefineConfig(policy="band"), SEED, [SIZE])
    assert selected(draw, 0)["kept"].sum() == 1500


def test_an_expression_that_fails_on_the_way_is_named(rounds: Path) -> None:
    with pytest.raises(ValueError, match=r"refine.sql: 'source::int' cannot be computed for every sample \(Conversion"):
        selected(draw_of(rounds, policy="sql", sql="source::int"))
