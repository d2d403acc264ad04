"""The results of an architecture search: `sweep.duckdb`, a database of views over the rows of its trials."""

from pathlib import Path

import duckdb
import pyarrow as pa

from data_scoring.base.databases import replacing_views
from data_scoring.base.parquet import write_parquet
from data_scoring.base.sql import condition_of_files, literal, parquet_rows, rows_beside
from flows.experiments.generation_speed import BATCH_SIZE
from flows.experiments.trials import TRIAL

FACTORS = ("depth", "width", "expansion")
OUTCOMES = ("quality", "task score", "generation speed")

_TRIALS, _OPTIONS = "*/trial.parquet", "union_by_name = true"

# Views by name: (comment, SQL).
_VIEWS = {
    "trials": (
        "One row per trial: its shape, its losses (nats per token), its speeds (tokens per second; generation_speed is "
        "that of a batch, sequence_speed that of one of its sequences). Quality is the negative loss over all "
        "validation tokens; task_score is the mean over tasks, percent.",
        f"""select *, -loss as quality, 100 * list_avg([part.score for part in scores]) as task_score,
            generation_speed / {BATCH_SIZE} as sequence_speed
        from {{trials}}""",
    ),
    "points": (
        "One row per trained trial, factor and measured outcome.",
        """select trial, factor, value, outcome, result from (
            select trial, num_layers::double as depth, hidden_size::double as width, expansion, quality,
                task_score as "task score", generation_speed as "generation speed"
            from trials where state = 'trained'
        ) unpivot (value for factor in (depth, width, expansion))
        unpivot (result for outcome in (quality, "task score", "generation speed"))""",
    ),
    "correlations": (
        "Spearman's rank correlation of each factor with each outcome over at least three trained trials.",
        """select factor, outcome, count(*) as num_trials,
            case when isfinite(corr(value_rank, result_rank)) then corr(value_rank, result_rank) end as correlation
        from (
            select factor, outcome,
                rank() over (partition by factor, outcome order by value)
                    + (count(*) over (partition by factor, outcome, value) - 1) / 2 as value_rank,
                rank() over (partition by factor, outcome order by result)
                    + (count(*) over (partition by factor, outcome, result) - 1) / 2 as result_rank
            from points
        ) group by factor, outcome having count(*) >= 3
        order by outcome = 'generation speed', outcome, abs(correlation) desc""",
    ),
    "pareto": (
        "The trials on the Pareto front of quality and generation speed, the fastest first.",
        """select * from trials as mine where state = 'trained' and generation_speed is not null and not exists (
            from trials as other where other.quality >= mine.quality and other.generation_speed >= mine.generation_speed
                and (other.quality > mine.quality or other.generation_speed > mine.generation_speed)
        ) order by generation_speed desc, trial""",
    ),
}


def write_views(folder: Path) -> Path:
    """Write `sweep.duckdb` and return its path; its views also cover rows that trials in `folder` write later."""
    path = folder / "sweep.duckdb"
    # An empty table, so that the views work before the first trial is done.
    write_parquet(folder / "none" / "trial.parquet", TRIAL.empty_table(), "")
    path = path.resolve()
    rows = rows_beside(path, _TRIALS, options=_OPTIONS)
    with replacing_views(path) as connection:
        _create_views(connection, f"(from {rows} where {condition_of_files(path)})")
    return path


def _create_views(connection: duckdb.DuckDBPyConnection, trials: str) -> None:
    for name, (comment, sql) in _VIEWS.items():
        connection.execute(f"create view {name} as {sql.format(trials=trials)}")
        connection.execute(f"comment on view {name} is {literal(comment)}")


def open_views(folder: Path) -> duckdb.DuckDBPyConnection:
    """Return a connection to the views of the search in `folder`.

    They are created in memory, because a reader of `sweep.duckdb` may hold a lock on it.
    """
    connection = duckdb.connect()
    _create_views(connection, parquet_rows(folder, _TRIALS, options=_OPTIONS))
    return connection


def read_trials(folder: Path) -> list[dict[str, object]]:
    """Return one row per trial so far, the best first, rounded for display."""
    with open_views(folder) as views:
        rows: pa.Table = views.sql(
            """select trial, state, num_layers as depth, hidden_size as width, ffn_hidden_size as ffn,
                round(expansion, 2) as expansion, num_parameters as parameters, round(loss, 4) as loss,
                round(task_score, 1) as "tasks (%)", round(generation_speed, 1) as "generation (tokens/s)",
                round(sequence_speed, 2) as "of a sequence (tokens/s)",
                round(training_speed) as "training (tokens/s)", round(seconds) as seconds, reason
            from trials order by trials.loss nulls last, trial"""
        ).to_arrow_table()
    if rows["tasks (%)"].null_count == len(rows):
        rows = rows.drop_columns("tasks (%)")
    return list(rows.to_pylist())
