"""Figures in one style, rendered to PNG."""

import io
from collections.abc import Callable, Iterable
from typing import Any

import duckdb
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from flows.display.figure_text import make_readable

# Draws a figure from the ledger; None if the ledger has no data for it.
Plot = Callable[[duckdb.DuckDBPyConnection], Figure | None]

# One palette for what is told apart by colour: rounds, arms, runs.
COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"]
_DASHES = ["-", "--", ":", "-."]
_MOST_CHARACTERS = 40
# A moving average covers one in so many of a curve's points.
_NUM_WINDOWS = 30
# The share of a run's tokens in which its loss falls so far that the rest would be squeezed.
_FIRST_SHARE = 0.1

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


def panels(count: int, height: float, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """Return a figure and its `count` axes, in rows of at most three, with one x axis.

    height: of a row, in inches. Call `tight_layout` at the end.
    """
    columns = 2 if count == 4 else min(3, count)
    rows = -(-count // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(9, height * rows), squeeze=False, sharex=True, sharey=sharey)
    for unused in grid.flat[count:]:
        unused.set_visible(False)
    chosen = list(grid.flat[:count])
    # Matplotlib numbers the last row only, in which there may be fewer.
    for lowest in chosen[-columns:]:
        lowest.tick_params(labelbottom=True)
    return figure, chosen


def smooth(places: NDArray[np.floating], values: NDArray[np.floating]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the moving average of `values` over a thirtieth of the points, and the places at which it is known."""
    window = max(1, len(values) // _NUM_WINDOWS)
    return places[window - 1 :], np.convolve(values, np.ones(window) / window, mode="valid")


def late_limits(curves: Iterable[tuple[NDArray[Any], NDArray[Any]]]) -> tuple[float, float]:
    """Return limits of the y axis for curves (places, values) that fall steeply at first, such as losses.

    They leave out what would squeeze the rest: values in the first tenth of a curve's places, and curves that end above
    their beginning, as of a run that diverges. They are 0 and 1 if no value is finite.
    """
    finite = [(places[np.isfinite(values)], values[np.isfinite(values)]) for places, values in curves]
    finite = [(places, values) for places, values in finite if len(values)]
    if not finite:
        return 0.0, 1.0
    falling = [(places, values) for places, values in finite if values[-1] <= values[0]] or finite
    lowest = min(float(values.min()) for _, values in finite)
    highest = max(float(values[places >= _FIRST_SHARE * places[-1]].max()) for places, values in falling)
    margin = 0.05 * (highest - lowest) or 0.05
    return lowest - margin, highest + margin


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
        make_readable(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
        plt.close(figure)
    return buffer.getvalue()
