"""Scoring budgets: the cost and accuracy of cheaper scoring, measured on the calibration set, and the choice.

Costs are in training-token equivalents: a token's forward pass is a third of its training cost, since the backward pass
costs twice as much. The growth of attention's cost with the position is ignored.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from data_scoring.base.parquet import is_intact, read_parquet, write_parquet
from data_scoring.base.sql import parquet_rows, random_bits
from data_scoring.config import prefix_of
from data_scoring.corpus.corpus import Corpus
from data_scoring.losses.calibration import calibration_path, candidate_prefixes
from data_scoring.losses.seen_losses import is_everything_seen, last_seen
from data_scoring.refine.draw import draw_key, num_kept
from data_scoring.refine.refine_config import RefineConfig

FORWARD_COST = 1 / 3
CALIBRATION = "calibration"
_BUDGET = pa.schema(
    [
        ("candidate", pa.string()),
        ("correlation", pa.float64()),
        ("overlap", pa.float64()),
        ("chance_overlap", pa.float64()),
        ("sampling_rate", pa.float64()),
        ("temperature", pa.float64()),
        ("cost_tokens", pa.int64()),
        ("chosen", pa.bool_()),
        ("seconds", pa.float64()),
    ]
)


@dataclass(frozen=True)
class Candidate:
    """A scoring budget, with its cost (training-token equivalents) and, if measured, its accuracy.

    correlation: Spearman's rank correlation with the full loss.
    overlap: the share of the samples drawn by full loss that are also drawn by this one.
    chance_overlap: the same share for a draw that ignores losses, with the same random numbers.
    sampling_rate, temperature: of these draws. The next selection may have others: `refine` can change until it begins.
    """

    name: str
    cost_tokens: int
    correlation: float | None = None
    overlap: float | None = None
    chance_overlap: float | None = None
    sampling_rate: float | None = None
    temperature: float | None = None


def scoring_cost(corpus: Corpus, budget: str) -> int:
    """Return the cost of scoring the corpus with `budget` (full, seen or prefix:P), in training-token equivalents."""
    if budget == "seen":
        return 0
    longest = prefix_of(budget) or corpus.seq_length
    tokens = sum(
        int(np.minimum(corpus.lengths(shard), longest).sum(dtype=np.int64)) for shard in range(corpus.num_shards)
    )
    return round(FORWARD_COST * tokens)


def measure_candidates(
    corpus: Corpus, round_folder: Path, round_number: int, refine: RefineConfig, seed: int
) -> list[Candidate]:
    """Return the candidates, cheapest first, as measured on the calibration set in `round_folder`.

    Seen losses are only a candidate if all samples have one. The draw is the paper's, with the sampling rate and the
    temperature of `refine`; the calibration set, a random part of the corpus like a shard, is drawn from as one.
    """
    budgets = [*(f"prefix:{prefix}" for prefix in candidate_prefixes(corpus.seq_length)), "full"]
    if is_everything_seen(corpus, round_folder.parent, round_number):
        budgets.insert(0, "seen")
    with duckdb.connect() as connection:
        _load_calibration(connection, round_folder, round_number)
        draw = partial(
            drawn, connection, sampling_rate=refine.sampling_rate, seed=seed,
            round_number=round_number + 1,
        )  # fmt: skip
        temperature = refine.draw_temperature
        by_loss, by_chance = draw('"full"', temperature=temperature), draw("0", temperature=1.0)
        return [
            Candidate(
                name=budget,
                cost_tokens=scoring_cost(corpus, budget),
                correlation=1.0 if budget == "full" else spearman(connection, "full", budget),
                overlap=len(by_loss & draw(f'"{budget}"', temperature=temperature)) / len(by_loss),
                chance_overlap=len(by_loss & by_chance) / len(by_loss),
                sampling_rate=refine.sampling_rate,
                temperature=temperature,
            )
            for budget in budgets
        ]


def _load_calibration(connection: duckdb.DuckDBPyConnection, round_folder: Path, round_number: int) -> None:
    """Create the table `calibration`: shard, sample, and a column of losses for each candidate, named after it."""
    connection.execute(
        f"""create table calibration as select *, loss as "full"
        from {parquet_rows(calibration_path(round_folder))}"""
    )
    seen = last_seen(round_folder.parent, round_number, "(shard, sample) in (select (shard, sample) from calibration)")
    connection.execute(
        f"""create or replace table calibration as select calibration.*, seen.loss as seen
        from calibration left join {seen} as seen using (shard, sample)"""
    )


def drawn(
    connection: duckdb.DuckDBPyConnection,
    column: str,
    sampling_rate: float,
    seed: int,
    round_number: int,
    temperature: float,
) -> set[tuple[int, int]]:
    """Return the (shard, sample) pairs of the table `calibration` that the paper's draw by the losses `column` keeps.

    The random numbers are those of refining for `round_number`.
    """
    key = draw_key(column, temperature, random_bits(seed, round_number, "shard::int", "sample::int"))
    [(num_samples,)] = connection.sql("select count(*) from calibration").fetchall()
    return set(
        connection.sql(
            f"""select shard, sample from calibration
            order by {key} desc, shard, sample limit {num_kept(num_samples, sampling_rate)}"""
        ).fetchall()
    )


def spearman(connection: duckdb.DuckDBPyConnection, first: str, second: str) -> float | None:
    """Return Spearman's rank correlation of two columns of the table `calibration`, or None if one is constant.

    Ties have their mean rank.
    """
    ranks = [
        f'rank() over (order by "{name}") + (count(*) over (partition by "{name}") - 1) / 2.0 as {rank}'
        for name, rank in ((first, "a"), (second, "b"))
    ]
    [(constant, value)] = connection.sql(
        f"select min(a) = max(a) or min(b) = max(b), corr(a, b) from (select {', '.join(ranks)} from calibration)"
    ).fetchall()
    return None if constant or value is None or math.isnan(value) else float(value)


def choose(candidates: Iterable[Candidate], min_correlation: float) -> Candidate:
    """Return the cheapest candidate with at least `min_correlation`; the full loss always qualifies."""
    eligible = [
        candidate
        for candidate in candidates
        if candidate.name == "full" or (candidate.correlation is not None and candidate.correlation >= min_correlation)
    ]
    return min(eligible, key=lambda candidate: candidate.cost_tokens)


def budget_path(round_folder: Path) -> Path:
    """Return the path of the candidates and the choice."""
    return round_folder / "budget.parquet"


def write_budget(
    round_folder: Path,
    candidates: Iterable[Candidate],
    chosen: str,
    calibration_tokens: int | None,
    seconds: float,
    fingerprint: str,
) -> None:
    """Write the candidates and the choice to budget.parquet, and the cost of calibration, if any, as another row.

    seconds: what scoring took, calibration included.
    """
    rows = [
        {
            **vars(candidate),
            "candidate": candidate.name,
            "chosen": candidate.name == chosen,
            "seconds": seconds if candidate.name == chosen else None,
        }
        for candidate in candidates
    ]
    if calibration_tokens is not None:
        rows.append({"candidate": CALIBRATION, "cost_tokens": calibration_tokens, "chosen": False})
    write_parquet(budget_path(round_folder), pa.Table.from_pylist(rows, _BUDGET), fingerprint)


def recorded_seconds(round_folder: Path, fingerprint: str) -> float:
    """Return the seconds that budget.parquet says scoring took; 0 if it is missing, or of other scoring."""
    path = budget_path(round_folder)
    if not is_intact(path, fingerprint):
        return 0.0
    table = read_parquet(path)
    # Versions before 0.12 did not write them.
    return max(table["seconds"].drop_null().to_pylist(), default=0.0) if "seconds" in table.column_names else 0.0


def calibration_cost(round_folder: Path) -> int:
    """Return the cost of scoring the calibration set in `round_folder`, in training-token equivalents."""
    with duckdb.connect() as connection:
        [(tokens,)] = connection.sql(
            f"select sum(num_tokens) from {parquet_rows(calibration_path(round_folder))}"
        ).fetchall()
    return round(FORWARD_COST * int(tokens))
