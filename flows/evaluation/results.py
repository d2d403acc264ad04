"""Task scores read from the ledger: rows of the paper's table, and details of each task."""

from collections.abc import Iterable, Sequence
from typing import Any

import duckdb
import pyarrow as pa

from data_scoring.evaluation.tasks import AVERAGE, PAPER, Column, columns
from flows.evaluation.results_table import Row, with_average, with_averages

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

# As published, evaluated with OpenCompass: PanGu-π Pro (arXiv 2402.02791), its table of results and section 1. Scores
# are in the order of `PAPER`, percent; for one model, only the average is known. docs/evaluation.md describes how they
# were compared.
_PUBLISHED = {
    "Sheared-LLaMA-1.3B": (24.28, 25.10, 25.77, 18.01, 62.39, 43.57, 72.91, 46.25, 16.44, 35.45),
    "TinyLLaMA-1.1B": (27.85, 24.64, 25.75, 18.54, 56.06, 45.47, 70.62, 46.25, 20.15, 36.71),
    "PanGu-π-1B": (36.85, 35.90, 35.96, 30.77, 58.44, 43.48, 61.92, 55.62, 15.92, 49.21),
    "PanGu-π-1B Pro": (46.50, 46.56, 50.38, 41.58, 63.43, 53.99, 64.96, 74.38, 18.40, 52.66),
    "Qwen-1.8B": (53.60, 52.12, 46.43, 35.83, 64.31, 57.79, 73.83, 88.12, 20.03, 58.30),
}
_PUBLISHED_AVERAGES = {"PanGu-π-1.5B Pro": 60.64}


def read_rows(ledger: duckdb.DuckDBPyConnection, name: str, rounds: Sequence[int] | None = None) -> list[Row]:
    """Return a row for each evaluated round (only `rounds`, if given) of the run called `name`."""
    found = ledger.sql("select round, task, 100 * score, 100 * stderr from final_scores order by round").fetchall()
    rows = []
    for number in dict.fromkeys(entry[0] for entry in found if rounds is None or entry[0] in rounds):
        mine = [entry for entry in found if entry[0] == number]
        scores = {task: score for _, task, score, _ in mine}
        errors = {task: error for _, task, _, error in mine if error is not None}
        rows.append(with_average(Row(f"{name}, round {number}", scores, errors), PAPER))
    return rows


def read_chance(ledger: duckdb.DuckDBPyConnection) -> dict[str, float]:
    """Return the chance score of each task that a run was evaluated on, percent, as of its last round."""
    return dict(ledger.sql("select task, 100 * arg_max(chance, round) from final_scores group by task").fetchall())


def chance_rows(chances: dict[str, float]) -> list[Row]:
    """Return the row of chance scores, or no row if there are none."""
    return [with_average(Row("chance", chances, {}, "chance"), PAPER)] if chances else []


def score_rows(found: Sequence[tuple[Any, ...]]) -> list[Row]:
    """Return the row of chance scores and a row per model, each with its average over the tasks that all have.

    found: one entry per model and task: the model's name, the task, score, standard error or None, chance; percent.
    """
    rows = [Row("chance", {task: chance for _, task, _, _, chance in found}, {}, "chance")]
    for name in dict.fromkeys(entry[0] for entry in found):
        mine = [entry for entry in found if entry[0] == name]
        errors = {task: error for _, task, _, error, _ in mine if error is not None}
        rows.append(Row(name, {task: score for _, task, score, _, _ in mine}, errors))
    return with_averages(rows)


def paper_rows() -> list[Row]:
    """Return the paper's published rows, in percent."""
    published = {label: dict(zip(PAPER, scores, strict=True)) for label, scores in _PUBLISHED.items()}
    published |= {label: {AVERAGE: score} for label, score in _PUBLISHED_AVERAGES.items()}
    return [with_average(Row(label, scores, {}, "quoted"), PAPER) for label, scores in published.items()]


def columns_of(rows: Sequence[Row]) -> list[Column]:
    """Return, in the table's order, the columns with a score in a row that is not quoted, and the average if any."""
    return [
        column
        for column in columns()
        if any(column.name in row.scores and (row.kind != "quoted" or column.name == AVERAGE) for row in rows)
    ]


def describe_items(counts: Iterable[tuple[str, int, int]]) -> str:
    """Return a sentence with the numbers of scored and unscorable items of each task.

    counts: one entry per task and model: the task, scored items, and unscorable items.
    """
    found = list(counts)
    parts = []
    for column in columns():
        scored = sorted({count for task, count, _ in found if task == column.name})
        unscorable = max((count for task, _, count in found if task == column.name), default=0)
        if scored:
            more = f" ({unscorable:,} more could not be scored)" if unscorable else ""
            # Several numbers show that models were evaluated on different items, and are not comparable.
            parts.append(f"{' or '.join(f'{count:,}' for count in scored)} of {column.title}{more}")
    return f"Items: {', '.join(parts)}."


def read_items(ledger: duckdb.DuckDBPyConnection) -> str:
    """Return a sentence with the numbers of items that a run's final models were evaluated on."""
    return describe_items(ledger.sql("select task, num_items, num_unscorable from final_scores").fetchall())


def read_details(ledger: duckdb.DuckDBPyConnection, round_number: int) -> list[dict[str, Any]]:
    """Return a row for each task that a round's final model was evaluated on, in the table's order; in percent."""
    names = ["task", "metric", "score", "stderr", "chance", "items", "unscorable", "examples", "shortened"]
    found = ledger.sql(
        f"""select task, metric, round(100 * score, 2), round(100 * stderr, 2), round(100 * chance, 2), num_items,
            num_unscorable, num_fewshot, num_shortened
        from scores where round = {round_number} and is_end and subject is null"""
    ).fetchall()
    order = {column.name: place for place, column in enumerate(columns())}
    rows = [dict(zip(names, entry, strict=True)) for entry in found]
    # A task that another process added at run time may be unknown here.
    return sorted(rows, key=lambda row: order.get(row["task"], len(order)))
