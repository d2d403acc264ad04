"""Budgeted scoring: what each cheaper way to score costs and misses, measured on the calibration set, and the choice.

Costs are in training-token equivalents: a forward pass over a token is a third of a training step's work on it, whose
backward pass is two more. That attention costs more the further it looks back is left out.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from data_scoring.base.parquet import write_parquet
from data_scoring.base.sql import literal, random_bits
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
        ("cost_tokens", pa.int64()),
        ("chosen", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class Candidate:
    """A way to score, with what it costs (training-token equivalents) and, where measured, how close it comes.

    `correlation` is Spearman's with the full loss, `overlap` the share of the samples drawn by full loss that are drawn
    by this one too, `chance_overlap` the share that a draw with the same random numbers and no regard to loss has.
    """

    name: str
    cost_tokens: int
    correlation: float | None = None
    overlap: float | None = None
    chance_overlap: float | None = None


def scoring_cost(corpus: Corpus, budget: str) -> int:
    """Return what scoring the corpus by `budget` (full, seen or prefix:P) costs, in training-token equivalents."""
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

    Seen losses are a candidate only where all samples have one. The draw is the paper's with the sampling rate and
    temperature of `refine`, over the calibration set as if it were a shard: a shard is a random part, and so is it.
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
            )
            for budget in budgets
        ]


def _load_calibration(connection: duckdb.DuckDBPyConnection, round_folder: Path, round_number: int) -> None:
    """Make the table `calibration`: shard, sample, and a column of losses for each candidate, named after it."""
    connection.execute(
        f"""create table calibration as select *, loss as "full"
        from read_parquet({literal(calibration_path(round_folder))})"""
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
    """Return the (shard, sample) that the paper's draw by the losses in `column` keeps of the table `calibration`.

    A sample's random number is the one that refining for `round_number` uses.
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
    """Return Spearman's rank correlation of two columns of the table `calibration`, or None where one has no order.

    Ties have their mean rank; a column of one value alone has no order.
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
    """Return the cheapest candidate that has at least `min_correlation`; the full loss always does for itself."""
    fit = [
        candidate
        for candidate in candidates
        if candidate.name == "full" or (candidate.correlation is not None and candidate.correlation >= min_correlation)
    ]
    return min(fit, key=lambda candidate: candidate.cost_tokens)


def write_budget(
    round_folder: Path, candidates: Iterable[Candidate], chosen: str, calibration_tokens: int | None, fingerprint: str
) -> None:
    """Write what was measured and chosen to budget.parquet, with what measuring cost as a row of its own, if it was."""
    rows = [{**vars(candidate), "candidate": candidate.name, "chosen": candidate.name == chosen}
            for candidate in candidates]  # fmt: skip
    if calibration_tokens is not None:
        rows.append({"candidate": CALIBRATION, "cost_tokens": calibration_tokens, "chosen": False})
    write_parquet(round_folder / "budget.parquet", pa.Table.from_pylist(rows, _BUDGET), fingerprint)


def calibration_cost(round_folder: Path) -> int:
    """Return what scoring the calibration set in `round_folder` cost, in training-token equivalents."""
    with duckdb.connect() as connection:
        [(tokens,)] = connection.sql(
            f"select sum(num_tokens) from read_parquet({literal(calibration_path(round_folder))})"
        ).fetchall()
    return round(FORWARD_COST * int(tokens))
