"""Markdown tables."""


def markdown_table(head: list[str], cells: list[list[str]]) -> str:
    """Return a Markdown table aligned as plain text, the first column to the left, the others to the right."""
    first, *others = (max(len(row[place]) for row in [head, *cells]) for place in range(len(head)))

    def line(row: list[str]) -> str:
        numbers = (text.rjust(width) for text, width in zip(row[1:], others, strict=True))
        return f"| {' | '.join([row[0].ljust(first), *numbers])} |"

    rule = "|".join(["-" * (first + 2), *("-" * (width + 1) + ":" for width in others)])
    return "\n".join([line(head), f"|{rule}|", *(line(row) for row in cells)])
