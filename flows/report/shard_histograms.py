"""Histograms of each shard's losses: what a round's selection keeps, and what it drops."""

import math

import duckdb
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flows.display.figures import Plot
from flows.report.curves import DROPPED_COLOR, KEPT_COLOR, LOSS_LABEL, NUM_BINS

_MOST_SHARDS = 16


def selection_histograms(round_number: int) -> Plot:
    """Return the plot of each shard's losses, of samples kept and dropped for `round_number`."""

    def plot(ledger: duckdb.DuckDBPyConnection) -> Figure | None:
        [bounds] = ledger.sql(
            f"""select quantile_cont(loss, 0.001), quantile_cont(loss, 0.999), max(shard) + 1
            from selection where round = {round_number}"""
        ).fetchall()
        if bounds[0] is None:
            return None
        low, high, num_shards = float(bounds[0]), float(bounds[1]), int(bounds[2])
        width = max((high - low) / NUM_BINS, 1e-6)
        rows = ledger.sql(
            f"""select shard, greatest(0, least({NUM_BINS - 1}, floor((loss - {low}) / {width})))::int as bin,
                count(*) filter (kept) as kept, count(*) filter (not kept) as dropped
            from selection where round = {round_number} and shard < {_MOST_SHARDS} group by all"""
        ).fetchnumpy()
        shown = min(num_shards, _MOST_SHARDS)
        columns = min(4, shown)
        figure, grid = plt.subplots(
            math.ceil(shown / columns),
            columns,
            figsize=(9, 2.1 * math.ceil(shown / columns)),
            sharex=True,
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for shard, axes in enumerate(grid.flat):
            if shard >= shown:
                axes.set_visible(False)
                continue
            _draw_histogram(axes, rows, shard, low, width)
        grid.flat[0].legend(fontsize=8)
        figure.supxlabel(f"{LOSS_LABEL[0].upper()}{LOSS_LABEL[1:]}", fontsize=10)
        figure.supylabel("samples", fontsize=10)
        return figure

    return plot


def _draw_histogram(axes: Axes, rows: dict[str, np.ndarray], shard: int, low: float, width: float) -> None:
    chosen = rows["shard"] == shard
    heights = np.zeros((2, NUM_BINS))
    for row, name in enumerate(("kept", "dropped")):
        heights[row, rows["bin"][chosen]] = rows[name][chosen]
    edges = low + width * np.arange(NUM_BINS + 1)
    # One patch each: bars take a second for eight shards.
    axes.stairs(heights[0], edges, fill=True, color=KEPT_COLOR, label="kept")
    axes.stairs(heights[0] + heights[1], edges, baseline=heights[0], fill=True, color=DROPPED_COLOR, label="dropped")
    axes.set_title(f"shard {shard}")
