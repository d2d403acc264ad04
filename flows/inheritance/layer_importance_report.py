"""The page on layer importance: a plot and a table of the layer ablation, and the layers to keep."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pyarrow.parquet as pq
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from data_scoring.evaluation.tasks import task_title
from flows.display.figures import render_figure
from flows.display.result_page import Page, Picture, Section, write_page
from flows.evaluation.results import describe_items
from flows.inheritance.layer_importance import LayerAblation, keep_layers, predict_increase, read_ablation

_COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"]
# If increases differ by a larger factor than this, the axis is logarithmic, so that small ones remain distinguishable.
_LARGE_RATIO = 20


def write_importance_report(
    path: Path, name: str, skips: Path, depths: list[int], measured_on: str, scores: Path | None = None
) -> Page:
    """Write the page `path`, its Markdown and its plots, on the layer ablation `skips` of the model `name`.

    It lists the layers to keep for each target depth in `depths`; `measured_on` describes the text of the losses. With
    `scores` it also has the model's scores in evaluation tasks without each block.
    """
    measured = read_ablation(skips)
    loss = measured.rows[0, 0]["loss"]
    lead = [
        f"The loss with all {measured.num_layers} layers is {loss:.4f} nats per token, over {measured_on}. Layers are "
        "counted from 0.",
    ]
    png = render_figure(lambda: importance(measured))
    caption = "Increase of the loss when layers are skipped, by the first of them, with its standard error."
    sections, pictures = [_choices(skips, depths), _blocks(measured)], [Picture("increase", png, caption)]
    if scores is not None:
        rows = pq.read_table(scores).to_pylist()
        sections.append(_scores(rows))
        png = render_figure(lambda: _draw_scores(rows))
        pictures.append(Picture("scores", png, "Scores without a block, by its first layer; dashed: with all layers."))
    return write_page(path, f"{name}: layer importance", lead, sections, pictures)


def _scores(rows: list[dict[str, Any]]) -> Section:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    found = {(row["start"], row["length"], row["task"]): row for row in rows}
    cells = []
    for start, length in dict.fromkeys((row["start"], row["length"]) for row in rows):
        mine = [found[start, length, task] for task in tasks]
        last = start + length - 1
        label = "none" if not length else str(start) if length == 1 else f"{start} to {last}"
        mean = sum(row["score"] for row in mine) / len(mine)
        cells.append([label, *map(_score, mine), f"{100 * mean:.1f}"])
    chances = [found[0, 0, task]["chance"] for task in tasks]
    cells.append(["chance", *(f"{100 * chance:.1f}" for chance in chances), f"{100 * sum(chances) / len(chances):.1f}"])
    counts = [(row["task"], row["num_items"], row["num_unscorable"]) for row in rows]
    notes = ["Percent, ± standard error over items, before any training.", describe_items(counts)]
    head = ["skipped layers", *(task_title(task) for task in tasks), "average"]
    return Section("Scores in tasks", notes, head, cells)


def _score(row: dict[str, Any]) -> str:
    error = "" if row["stderr"] is None else f" ± {100 * row['stderr']:.1f}"
    return f"{100 * row['score']:.1f}{error}"


def _draw_scores(rows: list[dict[str, Any]]) -> Figure:
    """Draw the average score over tasks against the first skipped layer, one line per number of layers."""
    means: dict[int, dict[int, list[float]]] = {}
    for row in rows:
        means.setdefault(row["length"], {}).setdefault(row["start"], []).append(100 * row["score"])
    figure, axes = plt.subplots(figsize=(9, 4.2))
    for length, column in means.items():
        values = [sum(scores) / len(scores) for scores in column.values()]
        if length == 0:
            axes.axhline(values[0], color="black", linestyle="--", linewidth=0.8)
            continue
        color = _COLORS[(length - 1) % len(_COLORS)]
        axes.plot(list(column), values, "o-", color=color, markersize=4, label=f"{_count(length)} skipped")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("first skipped layer")
    axes.set_ylabel("average score (percent)")
    axes.legend()
    return figure


def _choices(skips: Path, depths: list[int]) -> Section:
    num_layers, cells = read_ablation(skips).num_layers, []
    for depth in depths:
        kept = keep_layers(skips, depth)
        dropped = [layer for layer in range(num_layers) if layer not in kept]
        increase = f"{predict_increase(skips, kept):+.4f}"
        cells.append([str(depth), f"**{list(kept)}**", str(dropped), increase])
    notes = [
        "The layers whose removal would cost most are kept, always with the first and the last unless only one is "
        "kept. The predicted increase, in nats per token and before any training, is the sum over the runs of dropped "
        f"layers. In a run of more than {read_ablation(skips).longest} layers, each further layer costs what it adds "
        "to the longest block that ends with it.",
    ]
    return Section("Layers to keep", notes, ["layers", "kept", "dropped", "increase of the loss"], cells)


def _blocks(measured: LayerAblation) -> Section:
    lengths = range(1, measured.longest + 1)
    cells = [
        [str(start), *(_increase(measured, start, length) for length in lengths)]
        for start in range(measured.num_layers)
    ]
    notes = ["Increase of the loss, nats per token, ± standard error over samples; the lowest of each column is bold."]
    return Section("Every block", notes, ["first skipped", *map(_count, lengths)], cells)


def _increase(measured: LayerAblation, start: int, length: int) -> str:
    row = measured.rows.get((start, length))
    if row is None:
        return ""
    error = "" if row["stderr"] is None else f" ± {row['stderr']:.4f}"
    text = f"{row['increase']:+.4f}{error}"
    return f"**{text}**" if row["increase"] == min(_column(measured, length).values()) else text


def _column(measured: LayerAblation, length: int) -> dict[int, float]:
    """Return the increases of the blocks of `length` layers, by first layer."""
    return {start: row["increase"] for (start, other), row in measured.rows.items() if other == length}


def _count(length: int) -> str:
    return "1 layer" if length == 1 else f"{length} layers"


def importance(measured: LayerAblation) -> Figure:
    """Draw the increase of the loss against the first skipped layer, one line per number of layers."""
    figure, axes = plt.subplots(figsize=(9, 4.2))
    increases = [row["increase"] for (_, length), row in measured.rows.items() if length]
    for length in range(1, measured.longest + 1):
        column = _column(measured, length)
        errors = [measured.rows[start, length]["stderr"] or 0.0 for start in column]
        axes.errorbar(
            list(column), list(column.values()), yerr=errors, fmt="o-", color=_COLORS[(length - 1) % len(_COLORS)],
            markersize=4, capsize=2, label=f"{_count(length)} skipped",
        )  # fmt: skip
    if min(increases) > 0 and max(increases) > _LARGE_RATIO * min(increases):
        axes.set_yscale("log")
    else:
        axes.axhline(0, color="black", linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("first skipped layer")
    axes.set_ylabel("increase of the loss (nats per token)")
    axes.legend()
    return figure
