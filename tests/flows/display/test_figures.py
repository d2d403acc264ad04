"""Axes and their limits: what the figures show, and what they leave out."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from flows.display.figures import late_limits, panels

TOKENS = np.arange(1.0, 21.0)
# 9 at first, and 4 to 3 from the tenth of the tokens on.
FALLING = np.array([9.0, *np.linspace(4, 3, 19)])


@pytest.mark.parametrize(
    ("others", "limits"),
    [
        ([], (3 - 0.05, 4 + 0.05)),
        # Diverging, with a lowest value of its own.
        ([np.linspace(2, 900, 20)], (2 - 0.1, 4 + 0.1)),
        ([np.full(20, np.nan)], (3 - 0.05, 4 + 0.05)),
        ([np.where(TOKENS == 5, np.inf, 6.0)], (3 - 0.15, 6 + 0.15)),
    ],
)
def test_limits_leave_out_the_beginning_and_what_diverges(
    others: list[np.ndarray], limits: tuple[float, float]
) -> None:
    assert late_limits([(TOKENS, FALLING), *((TOKENS, values) for values in others)]) == pytest.approx(limits)


def test_limits_of_little_data_are_limits() -> None:
    assert late_limits([]) == late_limits([(TOKENS, np.full(20, np.nan))]) == (0, 1)
    assert late_limits([(TOKENS[:1], FALLING[:1])]) == pytest.approx((8.95, 9.05))
    # Nothing but what diverges.
    low, high = late_limits([(TOKENS, np.linspace(2, 12, 20))])
    assert low < 2 and high > 12


@pytest.mark.parametrize(
    ("count", "shape"), [(1, (1, 1)), (2, (1, 2)), (3, (1, 3)), (4, (2, 2)), (5, (2, 3)), (7, (3, 3))]
)
def test_the_lowest_panel_of_each_column_has_numbers(count: int, shape: tuple[int, int]) -> None:
    figure, grid = panels(count, height=3)
    assert grid[0].get_gridspec().get_geometry() == shape and len(grid) == count
    assert [axes.get_visible() for axes in figure.axes] == [place < count for place in range(shape[0] * shape[1])]
    numbered = [axes.xaxis.get_tick_params()["labelbottom"] for axes in grid]
    assert numbered == [place + shape[1] >= count for place in range(count)]
    plt.close(figure)
