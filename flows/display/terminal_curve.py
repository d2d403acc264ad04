"""A curve in a terminal, drawn with characters."""

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

# Dots of a Braille character, by row and column: two columns of four.
_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
_BLANK = 0x2800
_STYLES = ["cyan", "magenta", "green", "yellow", "blue", "red"]


def draw_curve(
    values: NDArray[np.float64], groups: NDArray[np.int64], width: int, height: int, is_ascii: bool = False
) -> list[Text]:
    """Return `height` lines of `width` characters that show `values`, [n], from left to right, each place by its mean.

    There are none in less than 9 characters.

    groups: a number for each value, [n], from 1; groups have different colours. The axis on the left shows the highest
    and the lowest mean. is_ascii: the terminal has only ASCII's characters.
    """
    across, down = (1, 1) if is_ascii else (2, 4)
    labels = 8
    if width <= labels:
        return []
    columns, rows = (width - labels) * across, height * down
    places = np.arange(len(values)) * min(columns, len(values)) // max(len(values), 1)
    # Few values are spread over the width.
    places = places * columns // max(min(columns, len(values)), 1)
    used, inverse = np.unique(places, return_inverse=True)
    means = np.bincount(inverse, values) / np.bincount(inverse) if len(values) else values
    low, high = (float(means.min()), float(means.max())) if len(means) else (0.0, 0.0)
    drawn = np.arange(used[-1] + 1) if len(used) else used
    # Between places that are far from each other, the line is straight.
    levels = np.interp(drawn, used, means) if len(used) else means
    heights = np.rint((high - levels) / ((high - low) or 1.0) * (rows - 1)).astype(int)
    cells = np.zeros((height, width - labels), dtype=int)
    colors = np.zeros(width - labels, dtype=int)
    owners = groups[np.searchsorted(places, drawn, side="right") - 1] if len(drawn) else groups
    for place, row, owner in zip(drawn, heights, owners, strict=True):
        cells[row // down, place // across] |= 1 if is_ascii else int(_DOTS[row % down, place % across])
        colors[place // across] = owner
    lines = []
    for number in range(height):
        label = f"{high:.4g}" if number == 0 else f"{low:.4g}" if number == height - 1 and high > low else ""
        line = Text(f"{label if len(values) else '':>{labels - 1}} ", no_wrap=True)
        for cell, color in zip(cells[number], colors, strict=True):
            character = ("*" if cell else " ") if is_ascii else chr(_BLANK + cell) if cell else " "
            line.append(character, style=_STYLES[(color - 1) % len(_STYLES)] if cell else None)
        lines.append(line)
    return lines
