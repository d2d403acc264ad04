"""The report's section on evaluation: the paper's table, the curves, and the items that could not be scored."""

import duckdb

from flows.display.figures import render
from flows.display.html import html_figure, html_table
from flows.evaluation.results import (
    chance_rows,
    columns_of,
    read_chance,
    read_items,
    read_other_columns,
    read_rows,
)
from flows.evaluation.results_table import render_table
from flows.report.curves import score_curves
from flows.report.pictures import Pictures
from flows.run.folder import Run

_CAPTION = (
    "Scores against tokens, over all rounds. The band is the standard error, a dot the end of a round, the dotted line "
    "the score of guessing."
)


def evaluation(run: Run, ledger: duckdb.DuckDBPyConnection, pictures: Pictures) -> list[str]:
    """Return the evaluation section as HTML, its picture added to `pictures`; empty if no model was evaluated."""
    rows = [*chance_rows(read_chance(ledger)), *read_rows(ledger, run.folder.name)]
    png = render(score_curves, ledger)
    sections = ["<h2>Evaluation</h2>"] if rows or png else []
    if rows:
        sections += [
            render_table(rows, columns_of(rows, read_other_columns(ledger)), "html"),
            f"<p>{read_items(ledger)}</p>",
        ]
    if png:
        pictures["scores"] = png
        sections.append(html_figure(png, _CAPTION))
    unscorable = ledger.sql(
        "select task, reason, count(distinct item), min(item) from unscorable group by task, reason order by all"
    ).fetchall()
    if unscorable:
        head = ["Task", "Why", "Items", "Example"]
        sections += ["<h3>Items that could not be scored</h3>", html_table(head, unscorable)]
    return sections
