"""HTML pages, figures and tables."""

import base64
import html

# Cells with more characters than this are set as running text.
_LONG_TEXT = 40
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; } .lead { opacity: .75; margin-top: .2rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child, td.text { text-align: left; }
td.text { font-size: 13px; overflow-wrap: anywhere; min-width: 14rem; }
h1, h2, h3, p, figcaption { overflow-wrap: anywhere; }
img { width: 100%; background: white; border-radius: 4px; }
pre { overflow-x: auto; background: #8881; padding: 1rem; border-radius: 4px; }
details { margin: 1rem 0; } summary { cursor: pointer; }
figure { margin: 1rem 0; overflow-x: auto; }
figcaption { opacity: .75; font-size: 14px; position: sticky; left: 0; }
@media (max-width: 720px) { body { margin: 1rem auto; } img { width: 720px; } th, td { padding: .3rem .5rem; } }
@media (prefers-color-scheme: dark) { img { filter: invert(.9) hue-rotate(180deg); } }
"""


def html_page(title: str, body: str) -> str:
    """Return a self-contained page with the HTML `body`."""
    name = html.escape(title)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Reprise: {name}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style><h1>{name}</h1>{body}</html>\n'
    )


def html_figure(png: bytes, caption: str) -> str:
    """Return the HTML of a figure with its caption; the picture is embedded."""
    data = base64.b64encode(png).decode()
    escaped = html.escape(caption)
    return (
        f'<figure><img alt="{escaped}" src="data:image/png;base64,{data}"><figcaption>{escaped}</figcaption></figure>'
    )


def html_details(summary: str, body: str) -> str:
    """Return the HTML `body` under a line that shows and hides it; at first it is hidden."""
    return f"<details><summary>{html.escape(summary)}</summary>{body}</details>"


def html_table(columns: list[str], rows: list[tuple[object, ...]]) -> str:
    """Return an HTML table of `rows` with the header `columns`."""
    # Long names, such as those of sources, may break at underscores.
    head = "".join(f"<th>{html.escape(column).replace('_', '_<wbr>')}" for column in columns)
    body = "".join("<tr>" + "".join(map(_cell, row)) for row in rows)
    return f"<table><tr>{head}{body}</table>"


def _cell(value: object) -> str:
    kind = " class=text" if isinstance(value, str) and len(value) > _LONG_TEXT else ""
    return f"<td{kind}>{html.escape(_text(value))}"


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)
