"""The report of a grid of batch sizes and learning rates: validation losses as table and heat map, training curves."""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from flows.display.figures import render_optional
from flows.display.result_page import Page, Picture, Section, span, write_page
from flows.experiments.grid_curves import Curves, draw_curves
from flows.run.config import RunConfig
from trainer.config import ScaledLr

# With fewer steps than this a trial has hardly warmed up, and its loss says little about its learning rate.
_FEW_STEPS = 20
_CAPTIONS = {
    "losses": "Validation loss, steps and peak rate; best framed.",
    "curves": "Training loss of every cell, a moving average over a thirtieth of its steps, means over seeds; in the "
    "legends, the last of each. Losses of the first tenth of the tokens may be above the figure.",
}
# One row (flows.experiments.trials.TRIAL) per seed, for each batch size in tokens and increment rate.
Rows = dict[tuple[int, float], list[dict[str, Any]]]


@dataclass(frozen=True)
class Cell:
    """One batch size and increment rate: peak learning rate, steps, and losses by seed (empty if any seed failed)."""

    batch: int
    rate: float
    lr: float
    num_steps: int
    losses: list[float]

    @property
    def loss(self) -> float:
        """Return the mean loss over seeds, or infinity if any seed failed."""
        return fmean(self.losses) if self.losses else float("inf")


def write_grid_report(path: Path, config: RunConfig, rule: ScaledLr, rows: Rows, curves: Curves) -> Page:
    """Write the page `path`, its Markdown and its pictures, from the results in `rows` and the training `curves`."""
    cells = [_cell(batch, rate, seeds) for (batch, rate), seeds in rows.items()]
    trained = [cell for cell in cells if cell.losses]
    best = min(trained, key=lambda cell: cell.loss, default=None)
    drawn = {
        "losses": render_optional(lambda: heat_map(cells, best) if trained else None),
        "curves": render_optional(lambda: draw_curves(curves, rule.base_tokens)),
    }
    sections = [_table(cells, best), _failures(rows)]
    pictures = [Picture(name, png, _CAPTIONS[name]) for name, png in drawn.items() if png is not None]
    return write_page(
        path,
        f"{config.run_name}: batch size and learning rate",
        _lead(rule, config, rows, cells, best),
        [section for section in sections if section is not None],
        pictures,
    )


def _cell(batch: int, rate: float, seeds: list[dict[str, Any]]) -> Cell:
    trained = [row for row in seeds if row["state"] == "trained"]
    # If one seed diverges, the rate is too high, whatever the other seeds do.
    losses = [row["loss"] for row in trained] if len(trained) == len(seeds) else []
    return Cell(batch, rate, seeds[0]["lr"], max((row["num_steps"] for row in trained), default=0), losses)


def _lead(rule: ScaledLr, config: RunConfig, rows: Rows, cells: list[Cell], best: Cell | None) -> list[str]:
    tokens = {row["num_tokens"] for seeds in rows.values() for row in seeds if row["state"] == "trained"}
    num_seeds = max(len(seeds) for seeds in rows.values())
    origin = "train.lr" if isinstance(config.train.lr, ScaledLr) else "the configuration's own train.lr and batch"
    count = span(min(tokens), max(tokens)) if tokens else "no"
    lines = [
        f"Peak learning rate (batch / {rule.base_tokens:,})^r × {rule.base_lr:g}, from {origin}; it decays to a tenth "
        f"of the peak. Each cell trains one round on {count} predicted tokens, the same samples in the same order; "
        f"{num_seeds} {'seed' if num_seeds == 1 else 'seeds'}, starting at {config.seed}.",
    ]
    if best is not None:
        lines.append(
            f"Lowest: batches of {best.batch:,} tokens at r = {best.rate:g}, peak {best.lr:.3g}, validation loss "
            f"{best.loss:.4f}."
        )
    few = sorted({cell.batch for cell in cells if cell.losses and cell.num_steps < _FEW_STEPS})
    if few:
        lines.append(
            f"Batches of {', '.join(f'{batch:,}' for batch in few)} tokens make fewer than {_FEW_STEPS} steps: their "
            "losses show too little training, not their learning rate. Give more --tokens, or smaller batches."
        )
    return lines


def _table(cells: list[Cell], best: Cell | None) -> Section:
    rates = list(dict.fromkeys(cell.rate for cell in cells))
    head = ["batch (tokens)", "steps"]
    for rate in rates:
        head += [f"loss, r = {rate:g}", "peak rate"]
    lines = []
    for batch in dict.fromkeys(cell.batch for cell in cells):
        mine = [cell for cell in cells if cell.batch == batch]
        line = [f"{batch:,}", f"{max(cell.num_steps for cell in mine):,}"]
        for cell in mine:
            line += [_loss(cell, is_best=cell == best), f"{cell.lr:.3g}"]
        lines.append(line)
    notes = ["Nats per token over all validation tokens, means over seeds ± standard deviation; the lowest is bold."]
    return Section("Validation loss", notes, head, lines)


def _loss(cell: Cell, is_best: bool) -> str:
    if not cell.losses:
        return "failed"
    text = f"{cell.loss:.4f}"
    if len(cell.losses) > 1:
        text += f" ± {stdev(cell.losses):.4f}"
    return f"**{text}**" if is_best else text


def _failures(rows: Rows) -> Section | None:
    failed = {row["trial"]: row["reason"] for seeds in rows.values() for row in seeds if row["state"] == "failed"}
    if not failed:
        return None
    cells = [[trial, str(reason)] for trial, reason in failed.items()]
    return Section("Failures", ["Run the same command to try them again."], ["trial", "reason"], cells)


def heat_map(cells: list[Cell], best: Cell | None) -> Figure:
    """Draw the loss of each cell, batches upward, increment rates to the right; failed cells stay blank."""
    batches, rates = (sorted({getattr(cell, name) for cell in cells}) for name in ("batch", "rate"))
    losses = np.full((len(batches), len(rates)), np.nan)
    figure, axes = plt.subplots(figsize=(max(8.0, 2.2 + 1.7 * len(rates)), 1.4 + 0.7 * len(batches)))
    for cell in cells:
        place = (batches.index(cell.batch), rates.index(cell.rate))
        if cell.losses:
            losses[place] = cell.loss
    image = axes.imshow(losses, cmap="viridis_r", origin="lower", aspect="auto")
    middle = float(np.nanmin(losses) + np.nanmax(losses)) / 2
    for cell in cells:
        row, column = batches.index(cell.batch), rates.index(cell.rate)
        text = f"{cell.loss:.4f}\n{cell.num_steps} steps, {cell.lr:.2g}" if cell.losses else f"failed\n{cell.lr:.2g}"
        color = "white" if cell.losses and cell.loss > middle else "black"
        axes.text(column, row, text, ha="center", va="center", fontsize=9, color=color)
    if best is not None:
        corner = (rates.index(best.rate) - 0.5, batches.index(best.batch) - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="#d55e00", linewidth=3))
    axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axes.set_yticks(range(len(batches)), [f"{batch:,}" for batch in batches])
    axes.set_xlabel("increment rate r")
    axes.set_ylabel("batch (tokens)")
    axes.grid(visible=False)
    figure.colorbar(image, label="validation loss (nats per token)")
    return figure
