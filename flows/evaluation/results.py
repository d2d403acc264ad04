"""Task scores read from the ledger: rows of the paper's table, and details of each task."""

from collections.abc import Iterable, Sequence
from typing import Any

import duckdb
import pyarrow as pa

from data_scoring.evaluation.tasks import AVERAGES, OTHER, TASKS, Column, columns, task_title
from flows.evaluation.results_table import Row, with_common_average, with_paper_averages

# A model's score in a task, with the columns of the view `scores`; 0 to 1.
SCORE = pa.struct(
    [
        ("task", pa.string()),
        ("score", pa.float64()),
        ("stderr", pa.float64()),
        ("chance", pa.float64()),
        ("num_items", pa.int64()),
        ("num_unscorable", pa.int64()),
    ]
)


def read_rows(ledger: duckdb.DuckDBPyConnection, name: str, rounds: Sequence[int] | None = None) -> list[Row]:
    """Return a row for each evaluated round (only `rounds`, if given) of the run called `name`."""
    found = ledger.sql(
        f"select round, task, {shown('score')}, {shown('stderr')} from final_scores order by round"
    ).fetchall()
    rows = []
    for number in dict.fromkeys(entry[0] for entry in found if rounds is None or entry[0] in rounds):
        mine = [entry for entry in found if entry[0] == number]
        scores = {task: score for _, task, score, _ in mine}
        errors = {task: error for _, task, _, error in mine if error is not None}
        rows.append(with_paper_averages(Row(f"{name}, round {number}", scores, errors)))
    return rows


def read_chance(ledger: duckdb.DuckDBPyConnection) -> dict[str, float]:
    """Return the chance score of each task that a run was evaluated on, percent, as of its last round."""
    query = "select task, 100 * arg_max(chance, round) from final_scores where chance is not null group by task"
    return dict(ledger.sql(query).fetchall())


def shown(column: str) -> str:
    """Return, in SQL, what tables show of a score or an error: percent, unless it is no share."""
    return f"case when is_share then 100 * {column} else {column} end"


def read_other_columns(ledger: duckdb.DuckDBPyConnection) -> list[Column]:
    """Return the columns of the tasks that are not in the table of tasks, with the metric that they show."""
    found = ledger.sql(
        "select task, metric, is_share, higher_is_better from final_scores qualify round = max(round) over "
        "(partition by task) order by task"
    ).fetchall()
    return [
        Column(task, f"{task} ({metric})", OTHER, is_share, higher_is_better)
        for task, metric, is_share, higher_is_better in found
        if task not in TASKS
    ]


def chance_rows(chances: dict[str, float]) -> list[Row]:
    """Return the row of chance scores, or no row if there are none."""
    return [with_paper_averages(Row("chance", chances, {}, "chance"))] if chances else []


def score_rows(found: Sequence[tuple[Any, ...]]) -> list[Row]:
    """Return the row of chance scores and a row per model, each with its average over the tasks that all have.

    found: one entry per model and task: the model's name, the task, score, standard error or None, chance or None; as
    tables show them.
    """
    rows = [Row("chance", {task: chance for _, task, _, _, chance in found if chance is not None}, {}, "chance")]
    for name in dict.fromkeys(entry[0] for entry in found):
        mine = [entry for entry in found if entry[0] == name]
        errors = {task: error for _, task, _, error, _ in mine if error is not None}
        rows.append(Row(name, {task: score for _, task, score, _, _ in mine}, errors))
    return with_common_average(rows)


def columns_of(rows: Sequence[Row], others: Sequence[Column] = ()) -> list[Column]:
    """Return, in the table's order, the columns with a score in a row that is not quoted, and the averages if any.

    others: the columns of `read_other_columns`, which follow; other tasks without one have scores that are shares.
    """
    known = {column.name: column for column in [*columns(), *others]}
    for task in dict.fromkeys(task for row in rows for task in row.scores):
        known.setdefault(task, Column(task, task, OTHER))
    return [
        column
        for column in known.values()
        if any(column.name in row.scores and (row.kind != "quoted" or column.name in AVERAGES) for row in rows)
    ]


def describe_items(counts: Iterable[tuple[str, int, int]]) -> str:
    """Return a sentence with the numbers of scored and unscorable items of each task.

    counts: one entry per task and model: the task, scored items, and unscorable items.
    """
    found = list(counts)
    parts = []
    names = [column.name for column in columns() if column.name in TASKS]
    for name in dict.fromkeys([*names, *sorted(task for task, _, _ in found)]):
        scored = sorted({count for task, count, _ in found if task == name})
        unscorable = max((count for task, _, count in found if task == name), default=0)
        if scored:
            more = f" ({unscorable:,} more could not be scored)" if unscorable else ""
            # Several numbers show that models were evaluated on different items, and are not comparable.
            parts.append(f"{' or '.join(f'{count:,}' for count in scored)} of {task_title(name)}{more}")
    return f"Items: {', '.join(parts)}."


def read_items(ledger: duckdb.DuckDBPyConnection) -> str:
    """Return a sentence with the numbers of items that a run's final models were evaluated on."""
    return describe_items(ledger.sql("select task, num_items, num_unscorable from final_scores").fetchall())


def read_details(ledger: duckdb.DuckDBPyConnection, round_number: int) -> list[dict[str, Any]]:
    """Return a row for each task that a round's final model was evaluated on, in the table's order.

    In percent, except for scores that are no shares.
    """
    names = ["task", "metric", "score", "stderr", "chance", "items", "unscorable", "examples", "shortened"]
    found = ledger.sql(
        f"""select task, metric, round({shown("score")}, 2), round({shown("stderr")}, 2), round(100 * chance, 2),
            num_items, num_unscorable, num_fewshot, num_shortened
        from scores where round = {round_number} and is_end and subject is null"""
    ).fetchall()
    order = {column.name: place for place, column in enumerate(columns())}
    rows = [dict(zip(names, entry, strict=True)) for entry in found]
    return sorted(rows, key=lambda row: (order.get(row["task"], len(order)), row["task"]))


def read_other_metrics(ledger: duckdb.DuckDBPyConnection, round_number: int) -> list[tuple[str, str]]:
    """Return, for each task that is not in the table of tasks, all metrics of a round's final model as text."""
    found = ledger.sql(
        f"""select task, metric, filter, score, stderr from metrics
        where round = {round_number} and is_end and subject is null and score is not null
        qualify step = max(step) over () order by task"""
    ).fetchall()
    texts: dict[str, list[str]] = {}
    for task, metric, chosen, score, error in found:
        name = metric if chosen == "none" else f"{metric} ({chosen})"
        texts.setdefault(task, []).append(f"{name} {score:.4f}" + ("" if error is None else f" ± {error:.4f}"))
    return [(task, ", ".join(parts)) for task, parts in texts.items() if len(parts) > 1]
