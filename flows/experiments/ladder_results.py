"""The results of a ladder: the columns of its Parquet file, and the views for its tables and plots."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pyarrow as pa

from data_scoring.base.sql import literal, parquet_rows
from flows.experiments.compare_results import scores_path

# A name that no source can have.
ALL_TEXT = "all text"

# One row per seed, step and source. loss: validation, nats per token; bits_per_byte: the same loss, per byte of the
# source's held-out text, of which there are num_bytes in num_tokens tokens. The others are of the step's whole run.
RESULTS = pa.schema(
    [
        ("seed", pa.int64()),
        ("step", pa.string()),
        ("source", pa.string()),
        ("bits_per_byte", pa.float64()),
        ("loss", pa.float64()),
        ("num_tokens", pa.int64()),
        ("num_bytes", pa.int64()),
        ("num_rounds", pa.int32()),
        ("vocab_size", pa.int64()),
        ("num_parameters", pa.int64()),
        ("embedding_share", pa.float64()),
        ("trained_tokens", pa.int64()),
        ("scoring_cost", pa.int64()),
    ]
)

_VIEWS = f"""
create view losses as
    select seed, step, source, bits_per_byte, 1 as place from results
    union all
    select seed, step, '{ALL_TEXT}', sum(bits_per_byte * num_bytes) / sum(num_bytes), 0
    from results group by seed, step;
create view spread as
    select step, source, place, avg(bits_per_byte) as mean, stddev_samp(bits_per_byte) as deviation
    from losses group by step, source, place;
create view paired as
    select mine.step, source, place, seed, mine.bits_per_byte - before.bits_per_byte as change
    from losses as mine join losses as before using (seed, source, place)
    where enum_code(mine.step) = enum_code(before.step) + 1;
create view changes as
    select step, source, place, avg(change) as mean, stddev_samp(change) / sqrt(count(*)) as error,
        count(*) filter (change < 0) as num_lower, count(*) as num_seeds
    from paired group by step, source, place;
create view steps as
    select step, any_value(num_rounds) as num_rounds, max(vocab_size) as vocab_size,
        max(num_parameters) as num_parameters, max(embedding_share) as embedding_share,
        sum(num_bytes) / sum(num_tokens) as bytes_per_token, min(trained_tokens) as least_tokens,
        max(trained_tokens) as most_tokens, min(scoring_cost) as least_scoring, max(scoring_cost) as most_scoring
    from results group by step;
"""


@contextmanager
def open_ladder(path: Path, steps: list[str]) -> Iterator[duckdb.DuckDBPyConnection]:
    """Yield a connection with the views of the results in the Parquet file `path`; `steps` sort in the given order.

    The views: losses (bits per byte by seed, step and source, plus all text), spread (over seeds), paired and changes
    (to the step before, same seed), steps (sizes and costs), and scores if tasks are named.
    """
    with duckdb.connect() as connection:
        connection.execute(f"create type step as enum ({', '.join(map(literal, steps))})")
        rows = f"select * replace (step::step as step) from {parquet_rows(path)}"
        connection.execute(f"create table results as {rows}")
        connection.execute(_VIEWS)
        if scores_path(path).exists():
            rows = f"select * replace (arm::step as arm) from {parquet_rows(scores_path(path))}"
            connection.execute(f"create table scores as {rows}")
        yield connection
