"""A result page with notes, tables and pictures, written as self-contained HTML, as Markdown, and as text."""

import html
import re
from dataclasses import dataclass, field
from pathlib import Path

from data_scoring.base.files import remove_leftovers, writing
from flows.display.html import html_figure, html_page, html_table
from flows.display.markdown import markdown_table


@dataclass(frozen=True)
class Page:
    """A written page: the path of its HTML, and the same content as plain text."""

    page: Path
    text: str


@dataclass(frozen=True)
class Section:
    """A section of a page: notes, a table's cells as text (**bold** for emphasis), and code to copy."""

    title: str
    notes: list[str]
    head: list[str] = field(default_factory=list)
    cells: list[list[str]] = field(default_factory=list)
    code: str = ""


@dataclass(frozen=True)
class Picture:
    """A plot as PNG, with the name of its file and its caption."""

    name: str
    png: bytes
    caption: str


def span(least: int, most: int) -> str:
    """Return a range of counts as text, or the single count if both are equal."""
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def write_page(path: Path, title: str, lead: list[str], sections: list[Section], pictures: list[Picture]) -> Page:
    """Write the page `path`, with Markdown and pictures named after it, and return it."""
    remove_leftovers(path.parent, path.stem)
    for picture in pictures:
        with writing(path.with_name(f"{path.stem}-{picture.name}.png")) as temporary:
            temporary.write_bytes(picture.png)
    text = "\n\n".join([f"# {title}", *lead, *map(_markdown, sections)])
    links = [f"![{picture.caption}]({path.stem}-{picture.name}.png)" for picture in pictures]
    _write(path.with_suffix(".md"), "\n\n".join([text, *links]) + "\n")
    figures = [html_figure(picture.png, picture.caption) for picture in pictures]
    _write(path, html_page(title, "".join([_paragraphs(lead), *figures, *map(_html, sections)])))
    return Page(path, text)


def _write(path: Path, content: str) -> None:
    with writing(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def _markdown(section: Section) -> str:
    table = [markdown_table(section.head, section.cells)] if section.cells else []
    code = [f"```yaml\n{section.code}```"] if section.code else []
    return "\n\n".join([f"## {section.title}", *section.notes, *table, *code])


def _html(section: Section) -> str:
    cells: list[tuple[object, ...]] = [tuple(row) for row in section.cells]
    table = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html_table(section.head, cells)) if cells else ""
    code = f"<pre>{html.escape(section.code)}</pre>" if section.code else ""
    return f"<h2>{html.escape(section.title)}</h2>{_paragraphs(section.notes)}{table}{code}"


def _paragraphs(lines: list[str]) -> str:
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines)
