"""The paper's table: models as rows, tasks as columns in their groups, for a terminal, Markdown, LaTeX and HTML.

Layout after PanGu-π Pro (arXiv 2402.02791): groups Examination, Knowledge, Reasoning and Understanding, then the
average; the best of a column is bold and the second underlined.
"""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.table import Table
from data_scoring.evaluation.tasks import AVERAGE, AVERAGES, TASKS, Column
from flows.display.markdown import markdown_text

Format = Literal["terminal", "markdown", "latex", "html"]
# Wider than any table: lines that the terminal wraps are easier to read than truncated cells.
_WIDTH = 400
_NOTE = "Percent. Chance is the score of guessing; quoted rows are as published, by another implementation."


@dataclass(frozen=True)
class Row:
    """A model's scores by column, in percent if they are shares, with known standard errors.

    kind: our own, quoted, or chance scores.
    """

    label: str
    scores: dict[str, float]
    errors: dict[str, float]
    kind: Literal["own", "quoted", "chance"] = "own"


def with_average(row: Row, tasks: Sequence[str], name: str = AVERAGE) -> Row:
    """Return `row` with the mean of its scores of `tasks` and its standard error as `name`, if it has all of them."""
    if name in row.scores or any(task not in row.scores for task in tasks):
        return row
    scores = {**row.scores, name: sum(row.scores[task] for task in tasks) / len(tasks)}
    errors = dict(row.errors)
    if all(task in row.errors for task in tasks):
        errors[name] = sum(row.errors[task] ** 2 for task in tasks) ** 0.5 / len(tasks)
    return Row(row.label, scores, errors, row.kind)


def with_paper_averages(row: Row) -> Row:
    """Return `row` with each of the paper's averages of whose tasks it has all scores."""
    for name, tasks in AVERAGES.items():
        row = with_average(row, tasks, name)
    return row


def with_common_average(rows: Sequence[Row]) -> list[Row]:
    """Return `rows`, each with its mean over the tasks that all rows have, if there are several."""
    common = [task for task in TASKS if all(task in row.scores for row in rows)]
    return [with_average(row, common) for row in rows] if len(common) > 1 else list(rows)


def rank(rows: Sequence[Row], column: Column) -> dict[int, Literal["best", "second"]]:
    """Return the indices of the rows with a column's best and second-best score; chance is not ranked.

    Scores that are displayed alike share a place. A single score is not ranked.
    """
    shown = {
        number: round(row.scores[column.name], _digits(column))
        for number, row in enumerate(rows)
        if column.name in row.scores and row.kind != "chance"
    }
    if len(shown) < 2:
        return {}
    first, *rest = sorted(set(shown.values()), reverse=column.higher_is_better)
    places: dict[int, Literal["best", "second"]] = {number: "best" for number, score in shown.items() if score == first}
    if rest and len(places) == 1:
        places |= {number: "second" for number, score in shown.items() if score == rest[0]}
    return places


def render_table(rows: Sequence[Row], columns: Sequence[Column], form: Format) -> str:
    """Return the table as text in the given format."""
    return {"terminal": _terminal, "markdown": _markdown, "latex": _latex, "html": _html}[form](rows, columns)


def table_cells(rows: Sequence[Row], columns: Sequence[Column]) -> list[list[str]]:
    """Return the table's cells, the label first; a column's best score is enclosed in `**`."""
    return _cells(rows, columns, {"best": "**{}**".format, "second": str}, " ± ", _label)


def _cells(
    rows: Sequence[Row],
    columns: Sequence[Column],
    mark: dict[str, Callable[[str], str]],
    plus_minus: str,
    label: Callable[[Row], str],
) -> list[list[str]]:
    """Return the table's cells, the label first; `mark` formats a column's best and second-best scores."""
    places = {column.name: rank(rows, column) for column in columns}
    table = []
    for number, row in enumerate(rows):
        line = [label(row)]
        for column in columns:
            place = places[column.name].get(number)
            line.append(_cell(row, column, mark[place] if place else str, plus_minus))
        table.append(line)
    return table


def _cell(row: Row, column: Column, mark: Callable[[str], str], plus_minus: str) -> str:
    if column.name not in row.scores:
        return "–"
    digits = _digits(column)
    score = mark(f"{row.scores[column.name]:.{digits}f}")
    return f"{score}{plus_minus}{row.errors[column.name]:.{digits}f}" if column.name in row.errors else score


def _digits(column: Column) -> int:
    return 1 if column.is_share else 3


def column_title(column: Column) -> str:
    """Return a column's title, with an arrow where a lower score is better."""
    return column.title if column.higher_is_better else f"{column.title} ↓"


def _note(columns: Sequence[Column]) -> str:
    if all(column.is_share for column in columns):
        return _NOTE
    others = ", ".join(column.title for column in columns if not column.is_share)
    return f"{_NOTE} Not in percent: {others}; ↓: lower is better."


def _label(row: Row) -> str:
    return f"{row.label} (quoted)" if row.kind == "quoted" else row.label


def _spans(columns: Sequence[Column]) -> list[tuple[str, int]]:
    return [(group, len(list(members))) for group, members in groupby(columns, key=lambda column: column.group)]


def _terminal(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="", padding=(0, 1))
    table.add_column("\nmodel", no_wrap=True)
    last = ""
    for column in columns:
        # A group's name is above its first column.
        group, last = ("" if column.group == last else column.group), column.group
        table.add_column(f"{group}\n{column_title(column)}", justify="right", no_wrap=True)
    mark: dict[str, Callable[[str], str]] = {
        "best": lambda text: f"\x1b[1m{text}\x1b[0m",
        "second": lambda text: f"\x1b[4m{text}\x1b[0m",
    }
    for cells in _cells(rows, columns, mark, " ±", _label):
        table.add_row(*(Text.from_ansi(cell) for cell in cells))
    return f"{print_wide(table)}\n{_note(columns)}"


def print_wide(table: "Table") -> str:
    """Return a table as text in its full width; with bold and underlines if standard output is a terminal."""
    from rich.console import Console

    console = Console(width=_WIDTH)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _markdown(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    heads = [
        markdown_text(f"{column.group}: {column_title(column)}" if column.group else column.title) for column in columns
    ]
    mark: dict[str, Callable[[str], str]] = {"best": "**{}**".format, "second": "<u>{}</u>".format}
    lines = [["model", *heads], ["---", *["---:"] * len(columns)], *_cells(rows, columns, mark, " ± ", _plain)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{_note(columns)}"


def _plain(row: Row) -> str:
    """Return the label, escaped for a Markdown table."""
    return markdown_text(_label(row))


def _latex(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    mark: dict[str, Callable[[str], str]] = {"best": r"\textbf{{{}}}".format, "second": r"\underline{{{}}}".format}
    groups = " & ".join(
        [""] + [rf"\multicolumn{{{count}}}{{c}}{{{_escaped(group)}}}" for group, count in _spans(columns)]
    )
    heads = " & ".join(["Model", *(_escaped(column_title(column)) for column in columns)])
    body = _cells(rows, columns, mark, r"\,$\pm$\,", lambda row: _escaped(_label(row)))
    lines = [
        rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
        r"\toprule",
        rf"{groups} \\",
        rf"{heads} \\",
        r"\midrule",
        *(" & ".join(cell.replace("–", "--") for cell in line) + r" \\" for line in body),
        r"\bottomrule",
        r"\end{tabular}",
        f"% {_note(columns)} Needs the packages booktabs and, for names in other scripts, fontspec.",
    ]
    return "\n".join(lines)


def _escaped(text: str) -> str:
    """Return `text`, escaped for LaTeX."""
    special = {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "π": r"$\pi$",
        "↓": r"$\downarrow$",
    }
    special |= {character: rf"\{character}" for character in "&%$#_{}"}
    return "".join(special.get(character, character) for character in text)


def _html(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    mark: dict[str, Callable[[str], str]] = {"best": "<b>{}</b>".format, "second": "<u>{}</u>".format}
    groups = "".join(
        f'<th colspan="{count}" style="text-align:center">{html.escape(group)}</th>' for group, count in _spans(columns)
    )
    heads = "".join(f"<th>{html.escape(column_title(column))}</th>" for column in columns)
    body = _cells(rows, columns, mark, " ± ", lambda row: html.escape(_label(row)))
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in body)
    style = "font-size: 13px; white-space: nowrap"
    return (
        f'<table style="{style}"><tr><th></th>{groups}</tr><tr><th>Model</th>{heads}</tr>{lines}</table>'
        f"<p>{html.escape(_note(columns))}</p>"
    )
