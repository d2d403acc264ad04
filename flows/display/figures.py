"""Figures in one style, rendered to PNG."""

import io
from collections.abc import Callable
from typing import Any

import duckdb
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

# Draws a figure from the ledger; None if the ledger has no data for it.
Plot = Callable[[duckdb.DuckDBPyConnection], Figure | None]

# One palette for what is told apart by colour: rounds, arms, runs.
COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"]
_DASHES = ["-", "--", ":", "-."]
_MOST_CHARACTERS = 40
# A moving average covers one in so many of a curve's points.
_NUM_WINDOWS = 30

_STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "axes.titlesize": 10,
}


def line_style(number: int) -> dict[str, Any]:
    """Return the colour and dashes of line `number`, counted from 0: they are distinct for the first 24."""
    return {"color": COLORS[number % len(COLORS)], "linestyle": _DASHES[number // len(COLORS) % len(_DASHES)]}


def legend_label(name: str) -> str:
    """Return a name, such as a folder's, as the label of a line: one short line that matplotlib shows as it is."""
    text = " ".join(name.split())
    if len(text) > _MOST_CHARACTERS:
        text = f"{text[: _MOST_CHARACTERS // 2]}…{text[1 - _MOST_CHARACTERS // 2 :]}"
    # Matplotlib reads dollars as mathematics, and leaves labels with a leading underscore out.
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def smooth(places: NDArray[np.floating], values: NDArray[np.floating]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the moving average of `values` over a thirtieth of the points, and the places at which it is known."""
    window = max(1, len(values) // _NUM_WINDOWS)
    return places[window - 1 :], np.convolve(values, np.ones(window) / window, mode="valid")


def render(plot: Plot, ledger: duckdb.DuckDBPyConnection) -> bytes | None:
    """Return the PNG that `plot` draws from the ledger, or None if there is no data for it."""
    return render_optional(lambda: plot(ledger))


def render_figure(draw: Callable[[], Figure]) -> bytes:
    """Return the PNG of the figure that `draw` returns, in the common style."""
    png = render_optional(draw)
    assert png is not None
    return png


def render_optional(draw: Callable[[], Figure | None]) -> bytes | None:
    """Return the PNG of the figure that `draw` returns, in the common style, or None if it returns none."""
    with plt.rc_context(_STYLE):
        figure = draw()
        if figure is None:
            return None
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
        plt.close(figure)
    return buffer.getvalue()
