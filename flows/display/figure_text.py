"""The text of figures: letters that the figures' font lacks come from other installed fonts, or are escaped."""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter

# Longer labels of ticks, such as names of sources, would take the figure's place.
_LONGEST_LABEL = 40
# Comes with matplotlib, and has a box for every letter.
_BOXES = "Last Resort"


def make_readable(figure: Figure) -> None:
    """Change the texts of `figure` such that every letter has a glyph, and labels of ticks have at most 40 letters."""
    axes = [axis for each in figure.axes for axis in (each.xaxis, each.yaxis)]
    labels = [label for axis in axes for label in axis.get_majorticklabels()]
    texts = [*dict.fromkeys([*labels, *figure.findobj(Text)])]
    fonts, missing = find_fonts("".join(sorted({letter for text in texts for letter in text.get_text()})))
    if fonts:
        for text in texts:
            text.set_fontfamily([*text.get_fontfamily(), *fonts])
    for axis in axes:
        if any(_label(label.get_text(), missing) != label.get_text() for label in axis.get_majorticklabels()):
            axis.set_major_formatter(_formatter(axis.get_major_formatter(), missing))
    for text in texts:
        if text not in labels:
            text.set_text(_escaped(text.get_text(), missing))


def find_fonts(letters: str) -> tuple[list[str], frozenset[str]]:
    """Return installed fonts for those of `letters` that the default font lacks, and the letters that none has."""
    missing = {letter for letter in letters if letter.isprintable()}
    missing -= _covered(font_manager.findfont(font_manager.FontProperties()), missing)
    fonts: list[str] = []
    for entry in sorted(font_manager.fontManager.ttflist, key=_order) if missing else []:
        if _BOXES not in entry.name and (found := _covered(entry.fname, missing)):
            fonts.append(entry.name)
            missing -= found
    return fonts, frozenset(missing)


def _order(entry: Any) -> tuple[bool, bool, str]:
    """Return what sorts upright fonts of normal weight first."""
    return entry.style != "normal", str(entry.weight) not in ("400", "normal", "regular"), entry.name


def _covered(path: str, letters: Iterable[str]) -> set[str]:
    return {letter for letter in letters if ord(letter) in _letters_of(path)}


@cache
def _letters_of(path: str) -> frozenset[int]:
    try:
        return frozenset(font_manager.get_font(path).get_charmap())
    except (OSError, RuntimeError):
        # A file that FreeType cannot read.
        return frozenset()


def _formatter(old: Callable[[float, int | None], str], missing: frozenset[str]) -> FuncFormatter:
    return FuncFormatter(lambda value, place: _label(old(value, place), missing))


def _label(text: str, missing: frozenset[str]) -> str:
    if len(text) > _LONGEST_LABEL:
        half = _LONGEST_LABEL // 2
        text = f"{text[:half]}…{text[1 - half :]}"
    return _escaped(text, missing)


def _escaped(text: str, missing: frozenset[str]) -> str:
    """Return `text` with code points in place of letters that would be shown as empty boxes."""
    return "".join(
        letter.encode("ascii", "backslashreplace").decode() if letter in missing else letter for letter in text
    )
