"""Values and other texts in error messages: one line of bounded length."""

from typing import Any

_MOST_CHARACTERS = 200


def shown(value: Any) -> str:
    """Return `value` as Python writes it, cut to 200 characters."""
    return one_line(repr(value))


def one_line(text: object, most: int = _MOST_CHARACTERS) -> str:
    """Return `text` without line breaks and control characters, cut to `most` characters."""
    # Cut first: the text may have millions of characters.
    words = " ".join(str(text)[: 4 * most].split())
    line = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in words)
    return line if len(line) <= most else f"{line[:most]}…"
