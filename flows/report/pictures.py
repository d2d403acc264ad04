"""The pictures of a run's report, embedded in the page and saved as files beside it."""

import html

import duckdb

from flows.display.figures import Plot, render
from flows.display.html import html_figure

# PNG files by their names, without the ending.
Pictures = dict[str, bytes]


def figure(pictures: Pictures, name: str, plot: Plot, ledger: duckdb.DuckDBPyConnection, caption: str) -> str:
    """Return a plot of the ledger as an HTML figure; the picture is also added to `pictures`."""
    png = render(plot, ledger)
    if png is None:
        return f"<p>{html.escape(caption)} No data yet.</p>"
    pictures[name] = png
    return html_figure(png, caption)
