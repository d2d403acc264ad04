"""The picture of docs/study.md."""

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.study.regimes import REGIMES
from benchmarks.study.results import EQUAL, differences

matplotlib.use("Agg")
_MEASURES = ("all tokens", "worst source")
_COLORS = {"better": "#009e73", "worse": "#d55e00", "": "#888888"}


def draw(results: Path, path: Path) -> None:
    """Write the picture of the differences between arms and the random draw, with their standard errors, to `path`."""
    rows = differences(results)
    regimes = [name for name in REGIMES if any(row[0] == name for row in rows)]
    loss = {row[2]: row[3] for row in rows if row[:2] == (regimes[-1], "all tokens")}
    arms = sorted({row[2] for row in rows}, key=lambda arm: loss.get(arm, 0.0))
    figure, grid = plt.subplots(
        len(_MEASURES), len(regimes), figsize=(2.6 * len(regimes) + 1, 6.4), sharey=True, squeeze=False
    )
    for line, measured in zip(grid, _MEASURES, strict=True):
        for axes, regime in zip(line, regimes, strict=True):
            found = {row[2]: row for row in rows if row[:2] == (regime, measured)}
            axes.axvspan(-2 * found[EQUAL][7], 2 * found[EQUAL][7], color="#dddddd")
            axes.axvline(0, color="black", linewidth=0.8)
            for place, arm in enumerate(arms):
                if arm in found:
                    mean, error, result = found[arm][3], found[arm][4], found[arm][8]
                    axes.errorbar(mean, place, xerr=np.nan_to_num(error or 0.0), fmt="o", color=_COLORS[result])
            axes.set_yticks(range(len(arms)), arms)
            axes.set_title(f"{regime}: {measured}", fontsize=10)
            axes.grid(axis="x", alpha=0.3)
    figure.supxlabel("loss less that of a random draw at equal cost (nats per token); gray: twice the noise of equals")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
