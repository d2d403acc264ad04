"""The training losses of all cells of a grid in one figure: batch sizes by colour, increment rates by dashes."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from flows.display.figures import smooth

# The tokens trained on and the loss (nats per token) after each step of a trial: [num_steps] each.
Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
# One curve per seed, for each batch size in tokens and increment rate.
Curves = Mapping[tuple[int, float], Sequence[Curve]]

_DASHES = ["-", "--", ":", "-."]
# What lies above this multiple of the initial loss, as of a run that diverges, is outside the figure.
_MOST_LOSS = 1.1


def draw_curves(curves: Curves, base_tokens: int) -> Figure | None:
    """Draw the smoothed training loss of each cell against tokens, means over seeds; None if no cell has steps.

    At `base_tokens` all rates are one cell. A cell whose seeds have different numbers of steps ends with the shortest.
    """
    drawn = {cell: _mean(seeds) for cell, seeds in curves.items() if all(len(losses) for _, losses in seeds)}
    if not drawn:
        return None
    batches = sorted({batch for batch, _ in curves})
    rates = sorted({rate for _, rate in curves})
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(batches)))
    figure, axes = plt.subplots(figsize=(9, 5))
    is_drawn = set()
    for (batch, rate), (tokens, losses) in sorted(drawn.items()):
        if batch == base_tokens and batch in is_drawn:
            continue
        is_drawn.add(batch)
        dashes = "-" if batch == base_tokens else _DASHES[rates.index(rate) % len(_DASHES)]
        what = "any r" if batch == base_tokens and len(rates) > 1 else f"r = {rate:g}"
        label = f"{batch:,} tokens, {what}: {losses[-1]:.3f}"
        axes.plot(
            tokens / 1e6, losses, color=colors[batches.index(batch)], linestyle=dashes, linewidth=1.2, label=label
        )
    lowest = min(float(np.nanmin(losses)) for _, losses in drawn.values())
    highest = max(float(losses[0]) for cell in drawn for _, losses in curves[cell])
    axes.set_ylim(lowest - 0.02 * (highest - lowest), _MOST_LOSS * highest)
    axes.set_xlabel("tokens trained on (millions)")
    axes.set_ylabel("training loss (nats per token)")
    axes.legend(title="batch, increment rate: last loss", loc="upper left", bbox_to_anchor=(1, 1), fontsize=9)
    return figure


def _mean(seeds: Sequence[Curve]) -> Curve:
    smoothed = [smooth(*curve) for curve in seeds]
    length = min(len(losses) for _, losses in smoothed)
    tokens, losses = (np.mean([each[place][:length] for each in smoothed], axis=0) for place in (0, 1))
    return tokens, losses
