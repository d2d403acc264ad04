"""The plots of several runs in one figure: training losses, validation losses by source, scores in tasks."""

from collections.abc import Sequence
from dataclasses import dataclass

import duckdb
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from flows.display.figures import late_limits, legend_label, line_style, panels, smooth
from flows.report.curves import LOSS_LABEL, ScoreCurve, read_score_curves, score_axes

_TOKENS_LABEL = "tokens trained on (millions)"


@dataclass(frozen=True)
class Curve:
    """A loss (nats per token) against the tokens trained on, over all rounds; all [num_points]."""

    rounds: NDArray[np.int64]
    tokens: NDArray[np.float64]
    losses: NDArray[np.float64]


@dataclass(frozen=True)
class Curves:
    """The curves of a run: its label, training loss by step, validation loss by source, scores by task."""

    label: str
    training: Curve
    validation: dict[str, Curve]
    scores: dict[str, ScoreCurve]


def read_curves(ledger: duckdb.DuckDBPyConnection, label: str) -> Curves:
    """Return the curves of a run so far."""
    places = "(select round, step, loss, sum(num_tokens) over (order by round, step)::double as tokens from steps)"
    training = ledger.sql(f"select round, tokens, loss::double as loss from {places} order by round, step").fetchnumpy()
    validation = ledger.sql(
        f"""select round, tokens, source, validation.loss as loss
        from validation join (select round, step, tokens from {places}) using (round, step) order by source, tokens"""
    ).fetchnumpy()
    by_source = {str(name): validation["source"] == name for name in dict.fromkeys(validation["source"])}
    return Curves(
        label,
        Curve(training["round"], training["tokens"], training["loss"]),
        {
            name: Curve(*(validation[column][mine] for column in ("round", "tokens", "loss")))
            for name, mine in by_source.items()
        },
        read_score_curves(ledger),
    )


def training_losses(runs: Sequence[Curves]) -> Figure | None:
    """Draw the training loss of each run, smoothed within its rounds; None if none has begun to train."""
    if not any(len(run.training.tokens) for run in runs):
        return None
    figure, axes = plt.subplots(figsize=(9, 4.5))
    whole = []
    for number, run in enumerate(runs):
        curve = run.training
        rounds = [
            smooth(curve.tokens[curve.rounds == each] / 1e6, curve.losses[curve.rounds == each])
            for each in np.unique(curve.rounds)
        ]
        for place, (tokens, losses) in enumerate(rounds):
            label = legend_label(run.label) if place == 0 else None
            axes.plot(tokens, losses, linewidth=1.3, label=label, **line_style(number))
        if rounds:
            whole.append((np.concatenate([each for each, _ in rounds]), np.concatenate([each for _, each in rounds])))
    axes.set_ylim(*late_limits(whole))
    axes.set_xlabel(_TOKENS_LABEL)
    axes.set_ylabel(LOSS_LABEL)
    axes.legend()
    return figure


def validation_losses(runs: Sequence[Curves]) -> Figure | None:
    """Draw the validation loss of each source that a run has; None if none was measured."""
    sources = list(dict.fromkeys(source for run in runs for source in run.validation))
    if not sources:
        return None
    figure, grid = panels(len(sources), height=3)
    for axes, source in zip(grid, sources, strict=True):
        for number, run in enumerate(runs):
            if source in run.validation:
                curve = run.validation[source]
                label = legend_label(run.label)
                axes.plot(curve.tokens / 1e6, curve.losses, marker="o", markersize=3, label=label, **line_style(number))
        axes.set_title(legend_label(source))
    figure.supxlabel(_TOKENS_LABEL)
    figure.supylabel(LOSS_LABEL)
    _add_legend(figure, grid)
    return figure


def task_scores(runs: Sequence[Curves]) -> Figure | None:
    """Draw the scores of each run in each task (the paper's figure of two runs); None if none was evaluated."""
    tasks = list(dict.fromkeys(task for run in runs for task in run.scores))
    if not tasks:
        return None
    first = {task: next(run.scores[task] for run in runs if task in run.scores) for task in tasks}
    figure, grid = score_axes([curve.title for curve in first.values()])
    for axes, task in zip(grid, tasks, strict=True):
        for number, run in enumerate(runs):
            if task in run.scores:
                _draw_scores(axes, run.scores[task], number, legend_label(run.label))
        chance = first[task].chance
        if chance is not None:
            axes.axhline(chance, color="gray", linestyle=":")
    _add_legend(figure, grid)
    return figure


def _draw_scores(axes: Axes, curve: ScoreCurve, number: int, label: str) -> None:
    style, tokens, ends = line_style(number), curve.tokens / 1e6, curve.is_end
    low, high = curve.scores - curve.errors, curve.scores + curve.errors
    axes.fill_between(tokens, low, high, color=style["color"], alpha=0.12, linewidth=0)
    axes.plot(tokens, curve.scores, label=label, **style)
    axes.plot(tokens[ends], curve.scores[ends], "o", color=style["color"], markeredgecolor="black")


def _add_legend(figure: Figure, grid: Sequence[Axes]) -> None:
    """Add one legend for all axes of `figure`, below them."""
    handles: dict[str, Artist] = {}
    for axes in grid:
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(str(label), line)
    figure.tight_layout()
    figure.legend([*handles.values()], [*handles], loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2)
