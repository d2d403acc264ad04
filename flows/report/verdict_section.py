"""The verdict on a run as HTML: the first lines of its report."""

import html
import re

import duckdb

from flows.report.round_facts import read_facts
from flows.report.verdict import judge
from flows.run.folder import Run


def verdict_section(run: Run, ledger: duckdb.DuckDBPyConnection) -> list[str]:
    """Return the verdict on a run, as HTML."""
    verdict = judge(read_facts(run, ledger), run.config)
    lines = [f"<p><strong>{html.escape(verdict.headline)}</strong></p>"]
    if verdict.reasons:
        lines.append(f"<ul>{''.join(f'<li>{html.escape(reason)}' for reason in verdict.reasons)}</ul>")
    advice = re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(verdict.advice))
    return [*lines, f"<p>{advice}</p>"]
