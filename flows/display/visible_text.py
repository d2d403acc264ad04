"""Text of a corpus made safe to show: whatever a terminal or browser would act on is escaped."""

import unicodedata

from rich.cells import cell_len, chop_cells

# Controls, formats such as those that reverse the direction of text, halves of surrogate pairs, what is unassigned,
# and separators of lines and paragraphs.
_HIDDEN = ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp")


def visible(text: str, kept: str = "") -> str:
    r"""Return `text` with control characters, besides those in `kept`, as in Python: `\n`, `\x1b`."""
    if text.isprintable():
        return text
    return "".join(
        repr(letter)[1:-1] if letter not in kept and unicodedata.category(letter) in _HIDDEN else letter
        for letter in text
    )


def cut(text: str, most: int) -> str:
    """Return the first `most` characters of `text`, with an ellipsis in place of what is left out."""
    return text if len(text) <= most else f"{text[:most]}…"


def cut_to_width(text: str, width: int) -> str:
    """Return as much of `text` as fits into a line of `width` columns, of which Chinese characters take two each."""
    text = text[: width + 1]
    if cell_len(text) <= width:
        return text
    return f"{chop_cells(text, max(1, width - 1))[0]}…"
