"""Weights that undo the bias of a draw: over many draws, the weighted mean of what is kept is that of everything."""

from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_scoring.base.engine import LocalEngine
from data_scoring.base.parquet import write_parquet
from data_scoring.base.progress import silent
from data_scoring.ledger import create_views
from data_scoring.losses.shard_scoring import losses_path
from data_scoring.refine.candidates import Draw, Limits, candidates_query
from data_scoring.refine.part_bars import find_part_bars
from data_scoring.refine.refine_config import RefineConfig, SourceRule
from data_scoring.refine.refine_shards import mix_all, mix_selection, refine, selection_path
from data_scoring.refine.selection import Selection
from data_scoring.refine.training_mix import Mix
from tests.conftest import read_rows

SIZE = 40
RULES = (SourceRule(name="a", at_most=0.3), SourceRule(name="b", at_least=0.5))
CASES: dict[str, dict[str, Any]] = {
    "loss": {"policy": "loss"},
    "cool": {"policy": "loss", "temperature": 0.5, "sampling_rate": 0.2},
    "forgetting": {"policy": "sql", "sql": "loss - 0.3 * num_tokens"},
    "ruled": {"policy": "loss", "sources": RULES},
    "floor": {"policy": "loss", "sources": (SourceRule(name="b", at_least=0.4),), "sampling_rate": 0.4},
    "random": {"policy": "random"},
    "random and ruled": {"policy": "random", "sources": RULES},
    "all": {"policy": "all"},
    "within parts": {"policy": "loss", "within": "part"},
}


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A round of one shard that was trained and scored, and what is known of its samples."""
    folder, generator = tmp_path_factory.mktemp("scored"), np.random.default_rng(2)
    facts = {
        "sample": np.arange(SIZE, dtype=np.int32),
        "num_tokens": generator.integers(1, 4, SIZE).astype(np.int32),
        "source": generator.choice(["a", "b", "c"], SIZE),
        "loss": generator.normal(3, 1, SIZE).astype(np.float32),
    }
    write_parquet(losses_path(folder / "1", 0), pa.table(facts), "scored")
    order = generator.permutation(SIZE).astype(np.int32)
    write_parquet(folder / "1" / "mix.parquet", pa.table({"shard": np.zeros(SIZE, np.int32), "sample": order}), "m")
    samples = pa.table({"shard": np.zeros(SIZE, np.int32), **facts})
    write_parquet(folder / "samples.parquet", samples, "samples")
    return folder, facts


def draw_of(folder: Path, seed: int, **config: Any) -> Draw:
    config = {"outlier_z": None, "weights": "inverse", "max_weight": None, **config}
    return Draw(folder, 2, RefineConfig(**config), seed, [SIZE], num_parts=3)


def keep(keys: np.ndarray, sources: np.ndarray, config: RefineConfig) -> np.ndarray:
    """Return which samples are kept: every source's first up to its floor, then the highest of what ceilings leave."""
    rules = {rule.name: rule for rule in config.sources}
    kept, contest = np.zeros(len(keys), bool), []
    for source in set(sources):
        mine = np.flatnonzero(sources == source)
        mine = mine[np.argsort(-keys[mine])]
        rule = rules.get(source, SourceRule(name="any"))
        floor = int(rule.at_least * len(mine))
        kept[mine[:floor]] = True
        contest += mine[floor : int(rule.at_most * len(mine) + 0.5)].tolist()
    contest.sort(key=lambda sample: -keys[sample])
    kept[contest[: int(len(keys) * config.draw_rate + 0.5) - kept.sum()]] = True
    return kept


def thresholds(keys: np.ndarray, sources: np.ndarray, config: RefineConfig) -> np.ndarray:
    """Return, for each kept sample, the lowest of the other keys at which it would still be kept; -inf if at any."""
    found = np.full(len(keys), np.nan)
    for sample in np.flatnonzero(keep(keys, sources, config)):
        found[sample] = -np.inf
        for key in np.sort(keys[keys < keys[sample]])[::-1]:
            tried = keys.copy()
            tried[sample] = np.nextafter(key, -np.inf)
            if not keep(tried, sources, config)[sample]:
                found[sample] = key
                break
    return found


def probabilities(log_weights: np.ndarray, found: np.ndarray) -> np.ndarray:
    return 1 - np.exp(-np.exp(log_weights - found))


@pytest.mark.parametrize("case", [name for name, config in CASES.items() if config["policy"] in ("loss", "sql")])
def test_probabilities_are_those_of_the_threshold_of_each_sample(
    scored: tuple[Path, dict[str, np.ndarray]], case: str
) -> None:
    folder, facts = scored
    loss, tokens = facts["loss"].astype(float), facts["num_tokens"]
    order = np.argsort(read_order(folder))
    with duckdb.connect() as connection:
        for seed in range(4):
            draw = draw_of(folder, seed, **CASES[case])
            bars = find_part_bars(draw, Limits(), LocalEngine(1), folder)
            rows = connection.sql(
                f"from ({Selection(connection, draw, Limits(), bars).query(0)}) order by sample"
            ).fetchnumpy()
            keys = connection.sql(
                f"select key from ({candidates_query(draw, Limits(), 0)}) order by sample"
            ).fetchnumpy()
            log_weights = (loss - 0.3 * tokens if case == "forgetting" else loss) / draw.config.draw_temperature
            parts = order * 3 // SIZE if case == "within parts" else np.zeros(SIZE, int)
            for part in set(parts):
                mine = parts == part
                found = thresholds(keys["key"][mine], facts["source"][mine], draw.config)
                expected = probabilities(log_weights[mine], found)
                assert (np.isfinite(expected) == rows["kept"][mine]).all()
                kept = rows["kept"][mine]
                np.testing.assert_allclose(rows["probability"][mine][kept], expected[kept], rtol=1e-5)


def read_order(folder: Path) -> np.ndarray:
    return pq.read_table(folder / "1" / "mix.parquet")["sample"].to_numpy()


@pytest.mark.parametrize("sources", [
    (), (SourceRule(name="a", at_most=0.5), SourceRule(name="b", at_least=0.7)), (SourceRule(name="b", at_least=0.5),),
])  # fmt: skip
def test_weighted_sums_of_what_is_kept_are_unbiased(sources: tuple[SourceRule, ...]) -> None:
    """Of ten samples, drawn 1,500 times by a second implementation; the test above ties the first to it.

    At least two samples of every group can be kept: with one, the variance of a weight is infinite.
    """
    generator, draws = np.random.default_rng(7), 1_500
    log_weights, names = generator.normal(3, 1, 10), np.array(list("aaaabbbccc"))
    quantities = np.stack([log_weights, np.exp(-log_weights), names == "a", np.ones(10)])
    config = RefineConfig(sources=sources)
    estimates, plain = np.empty((draws, 4)), np.empty((draws, 4))
    for number in range(draws):
        keys = log_weights + generator.gumbel(size=10)
        found = thresholds(keys, names, config)
        kept = ~np.isnan(found)
        estimates[number] = (quantities[:, kept] / probabilities(log_weights, found)[kept]).sum(axis=1) / 10
        plain[number] = quantities[:, kept].mean(axis=1)
    error = estimates.std(axis=0) / np.sqrt(draws)
    assert (abs(estimates.mean(axis=0) - quantities.mean(axis=1)) < 4 * error).all()
    # What the weights undo is there.
    assert abs(plain.mean(axis=0) - quantities.mean(axis=1))[0] > 10 * plain.std(axis=0)[0] / np.sqrt(draws)


@pytest.mark.parametrize("case", ["random", "random and ruled", "all"])
def test_a_draw_without_scores_keeps_a_group_s_samples_with_equal_probability(
    scored: tuple[Path, dict[str, np.ndarray]], case: str
) -> None:
    folder, facts = scored
    with duckdb.connect() as connection:
        draw = draw_of(folder, 3, **CASES[case])
        bars = find_part_bars(draw, Limits(), LocalEngine(1), folder)
        rows = connection.sql(Selection(connection, draw, Limits(), bars).query(0)).fetchnumpy()
    groups = np.where(facts["source"] == "c", "", facts["source"]) if "ruled" in case else np.full(SIZE, "")
    for group in set(groups):
        mine = groups == group
        kept = rows["kept"] & mine
        np.testing.assert_allclose(rows["probability"][kept], kept.sum() / mine.sum(), rtol=1e-6)
    assert (1 / rows["probability"][rows["kept"]]).sum() == pytest.approx(SIZE, rel=1e-5)


@pytest.mark.parametrize("policy", ["top", "band"])
def test_what_is_kept_for_certain_has_equal_weights(scored: tuple[Path, dict[str, np.ndarray]], policy: str) -> None:
    with duckdb.connect() as connection:
        selection = Selection(connection, draw_of(scored[0], 1, policy=policy), Limits(), None)
        rows = connection.sql(selection.query(0)).fetchnumpy()
    assert (rows["probability"][rows["kept"]] == 1).all()


def test_a_source_that_joins_now_is_certain_and_what_is_excluded_has_none(
    scored: tuple[Path, dict[str, np.ndarray]],
) -> None:
    folder, facts = scored
    draw = draw_of(folder, 1, sources=(SourceRule(name="c", from_round=2),), min_tokens=2)
    with duckdb.connect() as connection:
        rows = connection.sql(Selection(connection, draw, Limits(), None).query(0)).fetchnumpy()
    fresh = (facts["source"] == "c") & (facts["num_tokens"] > 1)
    assert (rows["probability"][fresh] == 1).all()
    assert rows["kept"][fresh].all()
    assert np.ma.getmaskarray(rows["probability"])[facts["num_tokens"] == 1].all()


@pytest.mark.parametrize("limit", [None, 2.0, 1.2])
def test_weights_of_a_mix_have_mean_one_and_the_limit(
    scored: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, limit: float | None
) -> None:
    folder, facts = scored
    for round_file in ("1/mix.parquet", "1/losses/shard=0000.parquet"):
        (tmp_path / round_file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / round_file).write_bytes((folder / round_file).read_bytes())
    draw = draw_of(tmp_path, 5, max_weight=limit, temperature=0.5, max_tokens=int(facts["num_tokens"].sum()) // 3)
    refine(draw, "refined", LocalEngine(1), silent)
    path = tmp_path / "2" / "mix.parquet"
    mix_selection(path, draw, folder / "samples.parquet")
    mix = Mix(path)
    samples, weights = mix.read(0, len(mix))[1], mix.read_weights(0, len(mix))
    assert weights is not None
    assert weights.mean() == pytest.approx(1, abs=1e-6)
    probability = dict(read_rows(selection_path(draw.target, 0), "sample", "probability"))
    raw = np.array([1 / probability[sample] for sample in samples.tolist()])
    if limit is None:
        np.testing.assert_allclose(weights, raw / raw.mean(), rtol=1e-6)
        return
    assert weights.max() == pytest.approx(limit)
    below = weights < limit * (1 - 1e-6)
    assert 0 < below.sum() < len(below)
    ratios = weights[below] / raw[below]
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-5)
    assert (raw[~below] * ratios[0] >= limit * (1 - 1e-5)).all()


def test_a_mix_without_weights_has_no_such_column(scored: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    mix_all(tmp_path / "mix.parquet", scored[0] / "samples.parquet", 1)
    assert pq.read_schema(tmp_path / "mix.parquet").names == ["shard", "sample"]
    assert Mix(tmp_path / "mix.parquet").read_weights(0, 3) is None


@pytest.mark.parametrize("weighted", [(), (2,), (1, 2)])
def test_the_ledger_has_the_weights_of_all_rounds(tmp_path: Path, weighted: tuple[int, ...]) -> None:
    for number in (1, 2):
        columns: dict[str, Any] = {"shard": pa.array([0, 0], pa.int32()), "sample": pa.array([3, number], pa.int32())}
        selected = {"sample": [3], "loss": [1.5], "kept": [True], "reason": ["drawn by loss"]}
        if number in weighted:
            columns["weight"] = pa.array([0.5, 1.5], pa.float32())
            selected["probability"] = pa.array([0.25], pa.float32())
        folder = tmp_path / "rounds" / str(number)
        write_parquet(folder / "mix.parquet", pa.table(columns), "m")
        write_parquet(folder / "selection" / "shard=0004.parquet", pa.table(selected), "s")
    with duckdb.connect() as connection:
        create_views(connection, tmp_path)
        mix = connection.sql("from mix order by round, place").fetchall()
        selection = connection.sql("from selection order by round").fetchall()
    assert mix == [
        (number, place, 0, (3, number)[place], (0.5, 1.5)[place] if number in weighted else 1.0)
        for number in (1, 2)
        for place in (0, 1)
    ]
    assert selection == [
        (number, 4, 3, 1.5, True, "drawn by loss", 0.25 if number in weighted else None) for number in (1, 2)
    ]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"policy": "loss_batch", "weights": "inverse"}, "weights: policy loss_batch draws batches"),
        ({"policy": "loss", "keep_batches": True}, "keep_batches: policy loss draws no batches"),
        ({"policy": "sql"}, "sql: policy sql needs an expression"),
    ],
)
def test_what_does_not_fit_the_policy_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RefineConfig(**config)
