"""What models scored, as the ledger has it: rows of the paper's table, and details of each task."""

from collections.abc import Sequence
from typing import Any

import duckdb

from flows.evaluation_table import AVERAGE, COLUMNS, PAPER, Column, Row, with_average

# Averages over the ten tasks as published, scored with OpenCompass (PanGu-π Pro, arXiv 2402.02791, section 1 and its
# figure 1). Scores task by task are in the paper's table of results alone.
PAPER_AVERAGES = {
    "PanGu-π-1B": 42.41,
    "PanGu-π-1B Pro": 51.28,
    "PanGu-π-1.5B Pro": 60.64,
    "Qwen-1.8B": 55.04,
}


def read_rows(ledger: duckdb.DuckDBPyConnection, name: str, rounds: Sequence[int] | None = None) -> list[Row]:
    """Return a row for each round of a run, called `name`, whose last model was scored; of `rounds` alone, if given."""
    found = ledger.sql("select round, task, 100 * score, 100 * stderr from final_scores order by round").fetchall()
    rows = []
    for number in dict.fromkeys(entry[0] for entry in found if rounds is None or entry[0] in rounds):
        mine = [entry for entry in found if entry[0] == number]
        scores = {task: score for _, task, score, _ in mine}
        errors = {task: error for _, task, _, error in mine if error is not None}
        rows.append(with_average(Row(f"{name}, round {number}", scores, errors), PAPER))
    return rows


def read_chance(ledger: duckdb.DuckDBPyConnection) -> dict[str, float]:
    """Return what guessing scores in each task that a run was scored in, percent, by its last round."""
    return dict(ledger.sql("select task, 100 * arg_max(chance, round) from final_scores group by task").fetchall())


def chance_rows(chances: dict[str, float]) -> list[Row]:
    """Return the row of what guessing scores, or none where nothing was scored."""
    return [with_average(Row("chance", chances, {}, "chance"), PAPER)] if chances else []


def paper_rows() -> list[Row]:
    """Return the paper's rows, as published, of which the average alone is known here."""
    return [Row(label, {AVERAGE: score}, {}, "quoted") for label, score in PAPER_AVERAGES.items()]


def columns_of(rows: Sequence[Row]) -> list[Column]:
    """Return the columns in which a row has a score, in the table's order."""
    return [column for column in COLUMNS if any(column.name in row.scores for row in rows)]


def read_details(ledger: duckdb.DuckDBPyConnection, round_number: int) -> list[dict[str, Any]]:
    """Return a row for each task that the model of a round was scored in, in the table's order; figures in percent."""
    names = ["task", "metric", "score", "stderr", "chance", "items", "unscorable", "examples", "shortened"]
    found = ledger.sql(
        f"""select task, metric, round(100 * score, 2), round(100 * stderr, 2), round(100 * chance, 2), num_items,
            num_unscorable, num_fewshot, num_shortened
        from scores where round = {round_number} and is_end and subject is null"""
    ).fetchall()
    order = [column.name for column in COLUMNS]
    rows = [dict(zip(names, entry, strict=True)) for entry in found]
    return sorted(rows, key=lambda row: order.index(row["task"]))
