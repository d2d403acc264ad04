"""The pictures of a run's report, embedded in the page and saved as files beside it."""

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
        return f"<p>{html.escape(caption)} No data yet.</p>"
    save_picture(run, name, png)
    return html_figure(png, caption)


def save_picture(run: Run, name: str, png: bytes) -> None:
    """Save a picture of the report as a file beside it."""
    with writing(run.folder / "report" / f"{name}.png") as temporary:
        temporary.write_bytes(png)
