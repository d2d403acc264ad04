"""The plots of a comparison, each from the views of its results."""

import math

import duckdb
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flows.display.figures import COLORS, Plot
from flows.experiments.compare_results import BASE

_SCORED = "#bbbbbb"


def validation_losses(results: duckdb.DuckDBPyConnection) -> Figure | None:
    """Draw each source's validation loss by arm: a dot per seed, and the mean as a bar."""
    rows = results.sql(
        f"select source, arm, loss from losses where arm <> '{BASE}' order by place desc, source, arm"
    ).fetchall()
    sources = list(dict.fromkeys(row[0] for row in rows))
    columns = min(3, len(sources))
    shape = (math.ceil(len(sources) / columns), columns)
    num_arms = len({row[1] for row in rows})
    size = (9, shape[0] * (0.9 + 0.25 * num_arms))
    figure, grid = plt.subplots(*shape, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for number, axes in enumerate(grid.flat):
        axes.set_visible(number < len(sources))
        if number < len(sources):
            _draw_losses(axes, [(arm, loss) for source, arm, loss in rows if source == sources[number]])
            axes.set_title(sources[number])
    figure.supxlabel("validation loss (nats per token)", fontsize=10)
    return figure


def _draw_losses(axes: Axes, rows: list[tuple[str, float]]) -> None:
    arms = list(dict.fromkeys(arm for arm, _ in rows))
    for place, arm in enumerate(arms):
        losses = [loss for name, loss in rows if name == arm]
        color = COLORS[place % len(COLORS)]
        axes.plot([min(losses), max(losses)], [place, place], color=color, alpha=0.4)
        axes.plot(losses, [place] * len(losses), "o", color=color, alpha=0.5, markersize=4)
        axes.plot([sum(losses) / len(losses)], [place], "|", color=color, markersize=14, markeredgewidth=2)
    axes.set_yticks(range(len(arms)), arms)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.locator_params(axis="x", nbins=4)
    # Axis offsets such as +4.07 are hard to read, and without margins the dots of one seed lie on the frame.
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.margins(x=0.1)
    axes.grid(axis="y", visible=False)


def paired_differences(results: duckdb.DuckDBPyConnection) -> Figure | None:
    """Draw each source's difference to the reference: mean and standard error, and a dot per seed."""
    means = results.sql(
        "select source, arm, mean, coalesce(error, 0) from differences order by place desc, source, arm"
    ).fetchall()
    if not means:
        return None
    dots = results.sql("select source, arm, difference from paired").fetchall()
    [(reference,)] = results.sql("select arm from reference").fetchall()
    sources = list(dict.fromkeys(row[0] for row in means))
    arms = list(dict.fromkeys(row[1] for row in means))
    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.18 * len(sources) * (len(arms) + 1)))
    for number, arm in enumerate(arms):
        color = COLORS[number % len(COLORS)]
        places = {source: row + (number + 1) / (len(arms) + 1) - 0.5 for row, source in enumerate(sources)}
        mine = [row for row in means if row[1] == arm]
        seeds = [(difference, places[source]) for source, name, difference in dots if name == arm]
        axes.plot(*zip(*seeds, strict=True), "o", color=color, alpha=0.35, markersize=4)
        axes.errorbar(
            [row[2] for row in mine], [places[row[0]] for row in mine], xerr=[row[3] for row in mine],
            fmt="|", color=color, markersize=9, markeredgewidth=2, label=arm,
        )  # fmt: skip
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(sources)), sources)
    axes.set_ylim(len(sources) - 0.5, -0.5)
    axes.set_xlabel(f"validation loss minus that of arm {reference}, same seed (nats per token); lower is better")
    axes.grid(axis="y", visible=False)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def costs(results: duckdb.DuckDBPyConnection) -> Figure | None:
    """Draw the cost of each arm, in training-token equivalents: training and scoring, means over seeds."""
    rows = results.sql(
        "select arm, avg(trained_tokens) / 1e6, avg(scoring_cost) / 1e6 from costs group by arm order by arm"
    ).fetchall()
    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.35 * len(rows)))
    arms, trained, scored = zip(*rows, strict=True)
    axes.barh(arms, trained, color=COLORS[0], label="trained after round 1")
    axes.barh(arms, scored, left=trained, color=_SCORED, label="scoring, in training tokens")
    axes.invert_yaxis()
    axes.set_xlabel("cost after round 1 (millions of training-token equivalents)")
    axes.grid(axis="y", visible=False)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def training_curves(results: duckdb.DuckDBPyConnection) -> Figure | None:
    """Draw each arm's smoothed training loss against the tokens trained on: mean over seeds, and range."""
    [(window,)] = results.sql("select greatest(1, max(step) // 30) from curves").fetchall()
    rows = results.sql(
        f"""select arm, avg(num_tokens) / 1e6, avg(smooth), min(smooth), max(smooth) from (
            select *, avg(loss) over (partition by seed, arm order by step rows {window - 1} preceding) as smooth
            from curves)
        where step >= {window} group by arm, step order by arm, step"""
    ).fetchall()
    figure, axes = plt.subplots(figsize=(9, 4.5))
    for number, arm in enumerate(dict.fromkeys(row[0] for row in rows)):
        tokens, mean, low, high = zip(*(row[1:] for row in rows if row[0] == arm), strict=True)
        color = COLORS[number % len(COLORS)]
        axes.plot(tokens, mean, color=color, linewidth=1.5, label=arm)
        axes.fill_between(tokens, low, high, color=color, alpha=0.15, linewidth=0)
    axes.set_xlabel("tokens trained on (millions)")
    axes.set_ylabel("training loss (nats per token)")
    axes.legend()
    return figure


PLOTS: dict[str, tuple[Plot, str]] = {
    "losses": (validation_losses, "Final validation loss: a dot per seed, the mean as a bar. Scales differ."),
    "differences": (
        paired_differences,
        "Differences paired by seed: a dot per seed, and the mean with its standard error.",
    ),
    "costs": (costs, "Cost after round 1, which all arms share."),
    "curves": (
        training_curves,
        "Training loss, a moving average over a thirtieth of the steps: means over seeds, and their range.",
    ),
}
