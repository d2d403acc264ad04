"""Curves in a terminal show means at their places."""

import numpy as np
import pytest

from flows.display.terminal_curve import draw_curve


def draw(values: list[float], groups: list[int] | None = None, width: int = 20, is_ascii: bool = True) -> list[str]:
    numbers = np.array(groups or [1] * len(values), dtype=int)
    return [line.plain.rstrip() for line in draw_curve(np.array(values, float), numbers, width, 3, is_ascii)]


def test_values_are_drawn_from_left_to_right_and_high_to_low() -> None:
    assert draw([3.0, 2.0, 1.0], width=11) == ["      3 *", "         *", "      1   *"]
    # A few values are spread over the width, with a line between them.
    assert draw([3.0, 2.0, 1.0], width=17) == ["      3 **", "          ***", "      1      **"]


def test_each_place_shows_the_mean_of_its_values() -> None:
    values = [4.0, 2.0, 2.0, 2.0, 0.0, 2.0]
    assert draw(values, width=11) == ["      3 *", "         *", "      1   *"]


def test_braille_characters_have_eight_dots() -> None:
    # Two columns of twelve rows: the first dot at the top, the last one at the bottom.
    assert draw([2.0, 1.0], width=9, is_ascii=False) == ["      2 ⠁", "", "      1 ⢀"]


@pytest.mark.parametrize("values", [[], [2.5], [2.5, 2.5]])
def test_few_and_equal_values_are_no_mistake(values: list[float]) -> None:
    lines = draw(values)
    assert len(lines) == 3
    drawn = {0: [], 1: ["    2.5 *"], 2: ["    2.5 *******"]}
    assert [line for line in lines if "*" in line] == drawn[len(values)]


def test_rounds_have_colours_and_no_line_is_too_wide() -> None:
    lines = draw_curve(np.linspace(5, 1, 1000), np.repeat([1, 2], 500), 80, 8)
    assert {line.cell_len for line in lines} == {80}
    colors = {span.style for line in lines for span in line.spans if span.style}
    assert colors == {"cyan", "magenta"}


@pytest.mark.parametrize("width", range(14))
@pytest.mark.parametrize("is_ascii", [False, True])
def test_no_terminal_is_too_narrow(width: int, is_ascii: bool) -> None:
    lines = draw_curve(np.linspace(5, 1, 30), np.repeat([1, 2], 15), width, 8, is_ascii)
    assert [line.cell_len for line in lines] == ([] if width < 9 else 8 * [width])
