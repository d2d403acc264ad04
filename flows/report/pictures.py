"""The pictures of a run's report: in the page, and as files beside it."""

import html

import duckdb

from data_scoring.base.files import writing
from flows.display.figures import Plot, render
from flows.display.html import html_figure
from flows.run.folder import Run


def figure(run: Run, name: str, plot: Plot, ledger: duckdb.DuckDBPyConnection, caption: str) -> str:
    """Return a plot of the ledger as an HTML figure; the picture is also saved as `name`.png beside the report."""
    png = render(plot, ledger)
    if png is None:
        return f"<p>{html.escape(caption)} Nothing of it is there yet.</p>"
    save_picture(run, name, png)
    return html_figure(png, caption)


def save_picture(run: Run, name: str, png: bytes) -> None:
    """Write a picture of the report beside it."""
    with writing(run.folder / "report" / f"{name}.png") as temporary:
        temporary.write_bytes(png)
