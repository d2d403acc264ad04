"""The results of a comparison: the columns of its Parquet file, and the views for its tables and plots."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pyarrow as pa

from data_scoring.base.sql import literal, parquet_rows
from flows.evaluation.results import SCORE

BASE = "after round 1"
# Baseline arms: the reference for differences, if one of them is present.
_PLAIN = ("random", "gpt2", "base")
# Names that no source can have.
ALL_TOKENS, MEAN_OF_SOURCES = "all tokens", "mean of sources"

# One row per seed, arm and source; loss and num_tokens are of the validation set, the other values of the whole arm.
RESULTS = pa.schema(
    [
        ("seed", pa.int64()),
        ("arm", pa.string()),
        ("source", pa.string()),
        ("loss", pa.float64()),
        ("num_tokens", pa.int64()),
        ("num_steps", pa.int64()),
        ("trained_tokens", pa.int64()),
        ("scoring_cost", pa.int64()),
        ("round_1_tokens", pa.int64()),
    ]
)

# One row per step of an arm's first round, if arms train their own.
CURVES = pa.schema(
    [
        ("seed", pa.int64()),
        ("arm", pa.string()),
        ("step", pa.int32()),
        ("num_tokens", pa.int64()),
        ("loss", pa.float64()),
    ]
)

# One row per seed, arm and evaluation task, if the configuration names tasks.
SCORES = pa.schema([("seed", pa.int64()), ("arm", pa.string()), *SCORE])

_VIEWS = f"""
create view losses as
    select seed, arm, source, loss, 0 as place from results
    union all select seed, arm, '{MEAN_OF_SOURCES}', avg(loss), 1 from results group by seed, arm
    union all
    select seed, arm, '{ALL_TOKENS}', sum(loss * num_tokens) / sum(num_tokens), 2 from results group by seed, arm;
create view spread as
    select arm, source, place, avg(loss) as mean, stddev_samp(loss) as deviation, min(loss) as least, max(loss) as most
    from losses group by arm, source, place;
create view paired as
    select arm, source, place, seed, mine.loss - theirs.loss as difference
    from losses as mine join (select seed, source, loss from losses where arm = (select arm from reference)) as theirs
    using (seed, source) where arm not in ('{BASE}', (select arm from reference));
create view differences as
    select arm, source, place, avg(difference) as mean, stddev_samp(difference) / sqrt(count(*)) as error,
        count(*) filter (difference < 0) as num_lower, count(*) as num_seeds
    from paired group by arm, source, place;
create view costs as
    select distinct seed, arm, num_steps, trained_tokens, scoring_cost, round_1_tokens,
        trained_tokens + scoring_cost as cost
    from results where arm <> '{BASE}';
"""


def curves_path(results: Path) -> Path:
    """Return the path of the training losses of the comparison whose results are in `results`."""
    return results.with_name(f"{results.stem}-curves.parquet")


def scores_path(results: Path) -> Path:
    """Return the path of the scores in tasks of the comparison whose results are in `results`."""
    return results.with_name(f"{results.stem}-scores.parquet")


@contextmanager
def open_results(path: Path, arms: list[str]) -> Iterator[duckdb.DuckDBPyConnection]:
    """Yield a connection with the views of the results in the Parquet file `path`; `arms` sort in the given order.

    The views: losses (by seed, arm and source, plus the token mean and the mean of sources), spread (over seeds),
    paired and differences (to the arm in `reference`: random, gpt2 or base if present, else the first), costs (tokens;
    scoring in training-token equivalents), curves if arms train their own first round, and scores if tasks are named.
    """
    with duckdb.connect() as connection:
        names = ", ".join(literal(name) for name in [BASE, *arms])
        connection.execute(f"create type arm as enum ({names})")
        rows = f"select * replace (arm::arm as arm) from {parquet_rows(path)}"
        connection.execute(f"create table results as {rows}")
        reference = next((name for name in _PLAIN if name in arms), arms[0])
        connection.execute(f"create table reference as select {literal(reference)}::arm as arm")
        connection.execute(_VIEWS)
        for name, other in (("curves", curves_path(path)), ("scores", scores_path(path))):
            if other.exists():
                rows = f"select * replace (arm::arm as arm) from {parquet_rows(other)}"
                connection.execute(f"create table {name} as {rows}")
        yield connection
