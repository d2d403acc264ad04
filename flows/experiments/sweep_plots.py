"""The plots of an architecture search, each from the views over its trials."""

import duckdb
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flows.display.figures import Plot
from flows.experiments.sweep_results import FACTORS, OUTCOMES

_COLOR, _FRONT, _OTHERS = "#0072b2", "#d55e00", "#999999"
_AXIS = {
    "depth": "depth (layers)",
    "width": "width (hidden size)",
    "expansion": "expansion (FFN / width)",
    "quality": "quality\n(-validation loss, nats per token)",
    "task score": "task score\n(mean, percent)",
    "generation speed": "generation\n(tokens/s)",
}


def factors(views: duckdb.DuckDBPyConnection) -> Figure | None:
    """Draw every trial's quality, and its other outcomes, against each factor (the paper's figure)."""
    rows = views.sql("select factor, outcome, value, result from points").fetchall()
    outcomes = [outcome for outcome in OUTCOMES if any(row[1] == outcome for row in rows)]
    if not outcomes:
        return None
    found = views.sql("select factor, outcome, correlation from correlations").fetchall()
    correlations = {(factor, outcome): correlation for factor, outcome, correlation in found}
    shape = (len(outcomes), len(FACTORS))
    size = (9, 2.9 * len(outcomes))
    figure, grid = plt.subplots(*shape, figsize=size, sharex="col", sharey="row", squeeze=False, layout="constrained")
    for line, outcome in zip(grid, outcomes, strict=True):
        for axes, factor in zip(line, FACTORS, strict=True):
            points = [(value, result) for name, other, value, result in rows if (name, other) == (factor, outcome)]
            axes.plot(*zip(*points, strict=True), "o", color=_COLOR, alpha=0.75, markersize=5)
            correlation = correlations.get((factor, outcome))
            axes.set_title("" if correlation is None else f"Spearman {correlation:+.3f}")
            axes.ticklabel_format(axis="y", useOffset=False)
        line[0].set_ylabel(_AXIS[outcome])
    for axes, factor in zip(grid[-1], FACTORS, strict=True):
        axes.set_xlabel(_AXIS[factor])
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=factor != "expansion"))
    return figure


def front(views: duckdb.DuckDBPyConnection) -> Figure | None:
    """Draw quality against generation speed, with the Pareto front."""
    best = views.sql("select generation_speed, loss, num_layers, hidden_size, expansion from pareto").fetchall()
    if not best:
        return None
    others = views.sql(
        "select generation_speed, loss from trials where generation_speed is not null and trial not in "
        "(select trial from pareto)"
    ).fetchall()
    figure, axes = plt.subplots(figsize=(9, 4.5))
    if others:
        axes.plot(*zip(*others, strict=True), "o", color=_OTHERS, label="dominated by another trial")
    speeds, losses = [row[0] for row in best], [row[1] for row in best]
    axes.plot(speeds, losses, "o-", color=_FRONT, drawstyle="steps-post", label="Pareto front")
    for row in best:
        _name(axes, *row)
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.12)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.set_xlabel("generation speed (tokens/s); higher is better")
    axes.set_ylabel("validation loss (nats per token); lower is better, axis inverted")
    axes.legend()
    return figure


def _name(axes: Axes, speed: float, loss: float, depth: int, width: int, expansion: float) -> None:
    text = f"{depth} × {width}, {expansion:.2f}"
    axes.annotate(text, (speed, loss), textcoords="offset points", xytext=(6, 5), fontsize=8)


PLOTS: dict[str, tuple[Plot, str]] = {
    "factors": (factors, "Outcomes of each trial against the three factors, a dot per trial."),
    "front": (
        front,
        "Quality against speed, and the Pareto front with depth × width and expansion. No trial dominates those on it.",
    ),
}
