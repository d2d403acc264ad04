"""Figures in one style, rendered to PNG."""

import io
from collections.abc import Callable
from typing import Any

import duckdb
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

# Draws a figure from the ledger; None if the ledger has no data for it.
Plot = Callable[[duckdb.DuckDBPyConnection], Figure | None]

_STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "axes.titlesize": 10,
}


def render(plot: Plot, ledger: duckdb.DuckDBPyConnection) -> bytes | None:
    """Return the PNG that `plot` draws from the ledger, or None if there is no data for it."""
    return _render(lambda: plot(ledger))


def render_figure(draw: Callable[[], Figure]) -> bytes:
    """Return the PNG of the figure that `draw` returns, in the common style."""
    png = _render(draw)
    assert png is not None
    return png


def _render(draw: Callable[[], Figure | None]) -> bytes | None:
    with plt.rc_context(_STYLE):
        figure = draw()
        if figure is None:
            return None
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
        plt.close(figure)
    return buffer.getvalue()
