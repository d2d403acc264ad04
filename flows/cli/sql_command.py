"""`reprise sql`: one query over a run's ledger, or a prompt for several."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from flows.cli.options import path
from flows.run.folder import read_run

_INTRODUCTION = "end a query with ; (`show tables;` lists the views); Ctrl-C drops it, Ctrl-D ends"
_PROMPT, _PROMPT_WITHIN = "sql> ", "...> "


def add_sql(commands: Any) -> None:
    """Add the command to the parser's `commands`."""
    sql = commands.add_parser("sql", help="query the ledger with DuckDB SQL")
    sql.add_argument("run", type=path, metavar="RUN", help="run folder")
    sql.add_argument(
        "query",
        nargs="?",
        metavar="QUERY",
        help='such as "select * from rounds" (default: a prompt; queries end with ;)',
    )
    sql.add_argument("--timeout", type=float, default=300, metavar="SECONDS", help="time limit (default: 300)")
    sql.add_argument(
        "--unrestricted", action="store_true", help="allow all statements and files, and more than 4 GB of memory"
    )
    sql.set_defaults(command=answer, is_resumable=False)


def answer(options: argparse.Namespace) -> None:
    """Print the result of the query or, without one, of each that is typed or piped in."""
    read_run(options.run)
    if options.query is not None:
        _print_result(options, options.query)
    elif sys.stdin.isatty():
        _converse(options)
    else:
        for query in _queries(iter(sys.stdin)):
            _print_result(options, query)


def _print_result(options: argparse.Namespace, query: str) -> None:
    from flows.report.samples import query as ask

    ask(options.run, query, options.timeout, not options.unrestricted).show(max_rows=200, max_width=200)


def _converse(options: argparse.Namespace) -> None:
    """Answer queries at a prompt until Ctrl-D. A query that fails, or is stopped by Ctrl-C, does not end it."""
    with suppress(ImportError):
        # Gives `input` a history and editing.
        import readline  # noqa: F401
    print(_INTRODUCTION)
    while True:
        try:
            for query in _queries(_typed()):
                _print_result(options, query)
            print()
            return
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print()


def _typed() -> Iterator[str]:
    """Yield the lines that are typed until Ctrl-D."""
    prompt = _PROMPT
    while True:
        try:
            line = input(prompt)
        except EOFError:
            return
        # Whoever iterates runs the query before the next prompt.
        prompt = _PROMPT if _is_last(line) or (prompt == _PROMPT and not line.strip()) else _PROMPT_WITHIN
        yield line


def _queries(lines: Iterator[str]) -> Iterator[str]:
    """Yield the queries in `lines`; each but the last ends with a semicolon at the end of a line."""
    query = ""
    for line in lines:
        query = f"{query}\n{line}".strip()
        if _is_last(line):
            if query.strip(";"):
                yield query
            query = ""
    if query:
        yield query


def _is_last(line: str) -> bool:
    return line.rstrip().endswith(";")
