"""The training losses of all cells of a grid in one figure: a panel for each batch size, with its increment rates."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from flows.display.figures import late_limits, line_style, panels, smooth

# The tokens trained on and the loss (nats per token) after each step of a trial: [num_steps] each.
Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
# One curve per seed, for each batch size in tokens and increment rate.
Curves = Mapping[tuple[int, float], Sequence[Curve]]

_BASE_COLOR = "#999999"


def draw_curves(curves: Curves, base_tokens: int) -> Figure | None:
    """Draw the smoothed training loss of each cell against tokens, means over seeds; None if no cell has steps.

    At `base_tokens` all rates are one cell, which is in every panel. A cell whose seeds have different numbers of steps
    ends with the shortest.
    """
    drawn = {cell: _mean(seeds) for cell, seeds in curves.items() if all(len(losses) for _, losses in seeds)}
    if not drawn:
        return None
    base = next((curve for (batch, _), curve in sorted(drawn.items()) if batch == base_tokens), None)
    rates = sorted({rate for _, rate in curves})
    # Without one of its own, the panel of the base would hold one line, which the others have too.
    batches = sorted({batch for batch, _ in drawn if batch != base_tokens}) or [base_tokens]
    figure, grid = panels(len(batches), height=3.4, sharey=True)
    for axes, batch in zip(grid, batches, strict=True):
        if base is not None:
            what = f"batch {base_tokens:,}{', any r' if len(rates) > 1 else ''}: {base[1][-1]:.3f}"
            axes.plot(base[0] / 1e6, base[1], color=_BASE_COLOR, linewidth=1.2, label=what)
        for rate in rates:
            if batch != base_tokens and (batch, rate) in drawn:
                tokens, losses = drawn[batch, rate]
                style = line_style(rates.index(rate))
                axes.plot(tokens / 1e6, losses, linewidth=1.2, label=f"r = {rate:g}: {losses[-1]:.3f}", **style)
        axes.set_title(f"batch of {batch:,} tokens")
        axes.legend(loc="upper right", fontsize=8)
    grid[0].set_ylim(*late_limits(drawn.values()))
    figure.supxlabel("tokens trained on (millions)")
    figure.supylabel("training loss (nats per token)")
    figure.tight_layout()
    return figure


def _mean(seeds: Sequence[Curve]) -> Curve:
    smoothed = [smooth(*curve) for curve in seeds]
    length = min(len(losses) for _, losses in smoothed)
    tokens, losses = (np.mean([each[place][:length] for each in smoothed], axis=0) for place in (0, 1))
    return tokens, losses
