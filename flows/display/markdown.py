"""Markdown: tables, and text that stands for itself."""

import html
import re


def markdown_text(text: str) -> str:
    """Return a line of plain text, such as a folder's name, as Markdown."""
    return re.sub(r"[\\`*_|\[\]]", r"\\\g<0>", html.escape(" ".join(text.split()), quote=False))


def markdown_table(head: list[str], cells: list[list[str]]) -> str:
    """Return a Markdown table aligned as plain text, the first column to the left, the others to the right."""
    first, *others = (max(len(row[place]) for row in [head, *cells]) for place in range(len(head)))

    def line(row: list[str]) -> str:
        numbers = (text.rjust(width) for text, width in zip(row[1:], others, strict=True))
        return f"| {' | '.join([row[0].ljust(first), *numbers])} |"

    rule = "|".join(["-" * (first + 2), *("-" * (width + 1) + ":" for width in others)])
    return "\n".join([line(head), f"|{rule}|", *(line(row) for row in cells)])
