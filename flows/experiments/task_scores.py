"""Scores in tasks of the models that are compared: evaluating them, and their table."""

from typing import Any

import duckdb

from data_scoring.base.progress import Progress
from data_scoring.ledger import read_rows
from flows.display.result_page import Section
from flows.evaluation.results import columns_of, describe_items, score_rows
from flows.evaluation.results_table import table_cells
from flows.experiments.compare_results import SCORES
from flows.experiments.trials import named
from flows.run.folder import Run
from flows.run.locks import locked
from flows.stages.stage_order import complete


def read_task_scores(run: Run, progress: Progress) -> list[dict[str, Any]]:
    """Return a row for each evaluation task of the configuration: the final model's score, after evaluating it.

    Without scores that are no shares, which tables of comparisons average and show in percent.
    """
    if not run.config.eval.asked:
        return []
    last = run.config.rounds.num_rounds
    with locked(run.folder):
        complete(run, "evaluate", last, named(run.config, progress))
    names = SCORES.names[2:]
    found = read_rows(run.folder, f"select {', '.join(names)} from final_scores where round = {last} and is_share")
    return [dict(zip(names, row, strict=True)) for row in found]


def scores_section(results: duckdb.DuckDBPyConnection, chosen: str = "true", what: str = "arm") -> Section:
    """Return the table of the view `scores`: means over seeds, where `chosen`, in SQL, holds of an arm."""
    found = results.sql(
        f"""select arm, task, 100 * avg(score), 100 * coalesce(stddev_samp(score) / sqrt(count(*)), any_value(stderr)),
            100 * avg(chance)
        from scores where {chosen} group by arm, task order by arm"""
    ).fetchall()
    rows = score_rows(found)
    columns = columns_of(rows)
    counts = results.sql("select task, num_items, num_unscorable from scores").fetchall()
    [(num_seeds,)] = results.sql("select count(distinct seed) from scores").fetchall()
    means = "Percent, means over seeds, with their standard errors over seeds;"
    notes = [
        f"{means if num_seeds > 1 else 'Percent, with standard errors over items;'} the highest of a column is bold. "
        "The average is over the tasks shown.",
        describe_items(counts),
    ]
    return Section("Scores in tasks", notes, [what, *(each.title for each in columns)], table_cells(rows, columns))
