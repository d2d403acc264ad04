"""The report's curves and bars, each from an aggregate query of the ledger."""

from collections.abc import Sequence
from dataclasses import dataclass

import duckdb
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from data_scoring.evaluation.tasks import TASKS, task_title
from flows.display.figures import COLORS, Plot, legend_label, panels, smooth
from flows.evaluation.results import shown
from flows.report.round_facts import forgetting_parts

matplotlib.use("Agg")
KEPT_COLOR, DROPPED_COLOR = "#0072b2", "#bbbbbb"
_SEEN, _RESCORED = "#e69f00", "#0072b2"
NUM_BINS = 40
_MOST_SOURCES = 40
LOSS_LABEL = "loss (nats per token)"


def loss_curves(ledger: duckdb.DuckDBPyConnection) -> Figure | None:
    """Draw training and validation loss against the tokens trained on, over all rounds."""
    steps = ledger.sql(
        """select round, step, loss, sum(num_tokens) over (order by round, step) as tokens
        from steps order by round, step"""
    ).fetchnumpy()
    if len(steps["step"]) == 0:
        return None
    validation = ledger.sql(
        """select v.round, v.tokens, sum(v.loss * v.num_tokens) / sum(v.num_tokens) as loss from (
            select validation.round, validation.loss, validation.num_tokens, t.tokens from validation
            join (select round, step, sum(num_tokens) over (order by round, step) as tokens from steps) t
            using (round, step)
        ) v group by v.round, v.tokens order by v.tokens"""
    ).fetchnumpy()
    figure, axes = plt.subplots(figsize=(9, 4))
    for number in np.unique(steps["round"]):
        chosen = steps["round"] == number
        color = COLORS[(number - 1) % len(COLORS)]
        tokens, losses = steps["tokens"][chosen] / 1e6, steps["loss"][chosen]
        axes.plot(tokens, losses, color=color, alpha=0.3, linewidth=0.8)
        axes.plot(*smooth(tokens, losses), color=color, label=f"round {number}, training")
        points = validation["round"] == number
        axes.plot(
            validation["tokens"][points] / 1e6,
            validation["loss"][points],
            "o--",
            color=color,
            markeredgecolor="black",
            label=f"round {number}, validation",
        )
    axes.set_xlabel("tokens trained on (millions)")
    axes.set_ylabel(LOSS_LABEL)
    axes.legend()
    return figure


@dataclass(frozen=True)
class ScoreCurve:
    """The scores of a run in a task, [num_points] each, against tokens trained on.

    Scores and errors are in percent, unless the title says otherwise. is_end: whether the model is the one at the end
    of a round; chance: the score of guessing, None if it is unknown.
    """

    title: str

    tokens: NDArray[np.float64]
    scores: NDArray[np.float64]
    errors: NDArray[np.float64]
    is_end: NDArray[np.bool_]
    chance: float | None


def read_score_curves(ledger: duckdb.DuckDBPyConnection) -> dict[str, ScoreCurve]:
    """Return the scores in each task, over all rounds, in the order of the table of tasks."""
    found = ledger.sql(
        f"""select task, metric, is_share, higher_is_better, t.tokens::double as tokens, {shown("score")} as score,
            {shown("coalesce(stderr, 0)")} as error, coalesce(100 * chance, -1) as chance, is_end
        from scores join (select round, step, sum(num_tokens) over (order by round, step) as tokens from steps) as t
            using (round, step)
        where subject is null and score is not null order by task, tokens, is_end"""
    ).fetchnumpy()
    curves = {}
    for task in dict.fromkeys([*TASKS, *map(str, found["task"])]):
        mine = found["task"] == task
        if mine.any():
            tokens, score, error = (np.asarray(found[name][mine], float) for name in ("tokens", "score", "error"))
            ends = np.asarray(found["is_end"][mine], bool)
            metric, is_share, is_higher = (found[name][mine][-1] for name in ("metric", "is_share", "higher_is_better"))
            scale = "" if is_share else f" {'' if is_higher else '↓'} (not percent)"
            title = legend_label(task_title(task)) + ("" if task in TASKS else f"\n{legend_label(metric)}{scale}")
            chance = float(found["chance"][mine][0])
            curves[task] = ScoreCurve(title, tokens, score, error, ends, None if chance < 0 else chance)
    return curves


def score_axes(titles: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """Return a figure of scores against tokens, and its axes, one for each task; call `tight_layout` at the end."""
    figure, chosen = panels(len(titles), height=3)
    for axes, title in zip(chosen, titles, strict=True):
        axes.set_title(title)
    figure.supxlabel("tokens trained on (millions)")
    figure.supylabel("score (percent)")
    return figure, chosen


def score_curves(ledger: duckdb.DuckDBPyConnection) -> Figure | None:
    """Draw the score in each task against the tokens trained on, over all rounds (the paper's figure)."""
    curves = read_score_curves(ledger)
    # A single model is one point, which the table shows better.
    if len({tokens for curve in curves.values() for tokens in curve.tokens}) < 2:
        return None
    figure, grid = score_axes([curve.title for curve in curves.values()])
    for axes, curve in zip(grid, curves.values(), strict=True):
        tokens, low, high = curve.tokens / 1e6, curve.scores - curve.errors, curve.scores + curve.errors
        axes.fill_between(tokens, low, high, color=KEPT_COLOR, alpha=0.2, linewidth=0)
        axes.plot(tokens, curve.scores, color=KEPT_COLOR)
        ends = curve.is_end
        axes.plot(tokens[ends], curve.scores[ends], "o", color=KEPT_COLOR, markeredgecolor="black")
        if curve.chance is not None:
            axes.axhline(curve.chance, color="gray", linestyle=":")
    figure.tight_layout()
    return figure


def forgetting_curve(round_number: int, num_parts: int) -> Plot:
    """Return the plot of seen loss and re-scored loss along the training order of `round_number`.

    In fine stretches of steps and, beside them, in `num_parts` parts of the training order, as in the figure on
    forgetting in arXiv 2402.02791, "Multiple-Round Training".
    """

    def plot(ledger: duckdb.DuckDBPyConnection) -> Figure | None:
        fine = ledger.sql(
            f"""select avg(seen_loss) as seen, avg(loss) as loss, (min(step) + max(step)) / 2 as middle
            from (select *, max(step) over () as last from forgetting where round = {round_number})
            group by floor({NUM_BINS} * (step - 1) / last) order by middle"""
        ).fetchnumpy()
        if len(fine["middle"]) == 0:
            return None
        parts = forgetting_by_part(ledger, round_number, num_parts)
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, width_ratios=(3, 2))
        left.plot(fine["middle"], fine["seen"], color=_SEEN, label="seen loss: in the step that trained on the sample")
        left.plot(fine["middle"], fine["loss"], color=_RESCORED, label="re-scored loss: at the end of the round")
        left.set_xlabel("step of the round that trained on the sample")
        left.set_ylabel(LOSS_LABEL)
        left.legend()
        numbers = [part + 1 for part, *_ in parts]
        right.plot(numbers, [seen for _, _, seen, _ in parts], "o-", color=_SEEN)
        right.plot(numbers, [loss for *_, loss in parts], "o-", color=_RESCORED)
        right.xaxis.get_major_locator().set_params(integer=True)
        right.set_xlabel(f"part of the training order, of {num_parts}")
        figure.tight_layout()
        return figure

    return plot


def forgetting_by_part(
    ledger: duckdb.DuckDBPyConnection, round_number: int, num_parts: int
) -> list[tuple[int, int, float, float]]:
    """Return (part from 0, number of samples, mean seen loss, mean re-scored loss) of each part of a round's order."""
    return ledger.sql(
        f"""select part, count(*), avg(seen_loss), avg(loss)
        from ({forgetting_parts(round_number, num_parts)}) group by part order by part"""
    ).fetchall()


def kept_by_source(round_number: int) -> Plot:
    """Return the plot of the share of each source's samples that was kept for `round_number`."""

    def plot(ledger: duckdb.DuckDBPyConnection) -> Figure | None:
        rows = ledger.sql(
            f"""select source, 100.0 * avg(kept::int) as share, count(*) as total, count(*) filter (kept) as kept
            from selection join samples using (shard, sample) where round = {round_number}
            group by source order by share"""
        ).fetchall()
        if not rows:
            return None
        num_sources, label = len(rows), "share of the source's samples that is kept (%)"
        if num_sources > _MOST_SOURCES:
            # The picture would be too high.
            half = _MOST_SOURCES // 2
            rows = [*rows[:half], *rows[-half:]]
            label += f": the {half} lowest and highest of {num_sources:,} sources"
        figure, axes = plt.subplots(figsize=(9, 0.7 + 0.45 * len(rows)))
        names = [row[0] for row in rows]
        axes.barh(names, [100] * len(rows), color=DROPPED_COLOR)
        axes.barh(names, [row[1] for row in rows], color=KEPT_COLOR)
        for place, (_, share, total, kept) in enumerate(rows):
            axes.text(101, place, f"{share:.1f} %  ({kept:,} of {total:,})", va="center", fontsize=9)
        axes.set_xlim(0, 100)
        axes.set_xlabel(label)
        axes.grid(axis="y", visible=False)
        return figure

    return plot
