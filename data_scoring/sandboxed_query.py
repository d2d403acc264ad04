"""Queries of the user over a run's ledger, which read the run folder alone, write nothing, and end in time."""

import atexit
import json
import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb

from data_scoring.base.messages import one_line
from data_scoring.base.sql import check_nesting, escape_path, literal
from data_scoring.ledger import create_views

# The time limit of a query.
SECONDS = 300.0
_MOST_GB = 4.0
_SECONDS_TO_STOP = 5.0
# Exit status of a process that a signal ended.
_INTERRUPTED = 130
_EXPLAIN = re.compile(r"\s*explain\b(\s+analyze\b)?(\s*\([^)]*\))?", re.IGNORECASE)
# COPY can hide in a WITH clause, and any statement in serialised SQL.
_WRITERS = re.compile("COPY|EXPORT|EXECUTE")


def ask(
    run_folder: Path,
    sql: str,
    seconds: float = SECONDS,
    is_restricted: bool = True,
    register: Callable[[duckdb.DuckDBPyConnection], None] | None = None,
) -> duckdb.DuckDBPyRelation:
    """Return the rows that `sql` selects from the views of the ledger, whose files are read as they are now.

    The query runs in an empty database in memory with the same views as `ledger.duckdb`. is_restricted: it is a single
    select, reads no files outside of `run_folder`, and writes none. register: creates functions and views of the
    caller's own on the connection. Raises ValueError if it is not, if it fails, or if
    it takes more than `seconds`; a KeyboardInterrupt ends it.
    """
    if not seconds > 0:
        raise ValueError(f"timeout: {seconds:g} is not above 0; give a number of seconds")
    try:
        sql.encode()
    except UnicodeEncodeError:
        raise ValueError(f"sql: {one_line(ascii(sql))} is not UTF-8; correct it") from None
    check_nesting(sql)
    folder = run_folder.resolve()
    connection = duckdb.connect(config=_limits() if is_restricted else {})
    create_views(connection, folder)
    if register is not None:
        register(connection)
    if is_restricted:
        for setting in (
            # The views name the folder in a pattern.
            f"allowed_directories = [{literal(folder)}, {literal(escape_path(folder))}]",
            "enable_external_access = false",
            "lock_configuration = true",
        ):
            connection.execute(f"set {setting}")
    result = _Query(connection, sql, is_restricted).run(seconds)
    if result is None:
        raise ValueError("sql: the query returns no rows; write a select")
    return result


def _limits() -> dict[str, Any]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "memory_limit": f"{min(_MOST_GB * 1000, 0.8 * total / 1e6):.0f}MB",
        # Nothing is written to disk.
        "temp_directory": "",
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
        # A name in a query is a view, never a Python variable.
        "python_enable_replacements": False,
    }


class _Query:
    """A query in a thread of its own, so that the main thread can interrupt it."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, sql: str, is_restricted: bool) -> None:
        self._connection, self._sql, self._is_restricted = connection, sql, is_restricted
        self._result: duckdb.DuckDBPyRelation | None = None
        self._error: BaseException | None = None
        self._is_done = threading.Event()

    def run(self, seconds: float) -> duckdb.DuckDBPyRelation | None:
        """Return the result, or None if there is none."""
        # A daemon, so that the process can end while DuckDB does not react.
        threading.Thread(target=self._execute, daemon=True).start()
        try:
            # Not `join`: a KeyboardInterrupt makes that take the thread for ended.
            self._is_done.wait(min(seconds, threading.TIMEOUT_MAX))
        finally:
            is_late = not self._is_done.is_set()
            if is_late:
                self._connection.interrupt()
                self._is_done.wait(_SECONDS_TO_STOP)
                atexit.register(_end_despite, self._is_done)
        if is_late:
            raise ValueError(
                f"sql: not done after {seconds:g} s; write a cheaper query, or raise the timeout (--timeout; in Python "
                "timeout_seconds)"
            )
        if isinstance(self._error, duckdb.Error):
            hint = '`reprise sql RUN "show tables"` lists the views, and `reprise verify RUN` finds damaged files'
            raise ValueError(f"sql: {one_line(self._error, 600)}; {hint}") from None
        if self._error is not None:
            raise self._error
        return self._result

    def _execute(self) -> None:
        try:
            if self._is_restricted:
                _check(self._connection, self._sql)
            result = self._connection.sql(self._sql)
            # A valid query can still fail while it runs, for example in a cast.
            self._result = None if result is None else result.materialize()
        except Exception as error:  # noqa: BLE001 - raised again in the main thread
            self._error = error
        finally:
            self._is_done.set()


def _end_despite(is_done: threading.Event) -> None:
    """End the process if a query's thread is still in DuckDB, where the interpreter's own end would abort."""
    if not is_done.is_set():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_INTERRUPTED)


def _check(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    """Raise ValueError unless `sql` is one statement that only reads."""
    remedy = "write a single select, or use --unrestricted (in Python ledger())"
    statements = connection.extract_statements(sql)
    if len(statements) != 1:
        raise ValueError(f"sql: {len(statements)} statements; {remedy}")
    [statement] = statements
    query = statement.query
    if statement.type == duckdb.StatementType.EXPLAIN:
        explained = connection.extract_statements(_EXPLAIN.sub("", query, count=1))
        [statement] = explained if len(explained) == 1 else [statement]
        query = statement.query
    # MULTI is a pivot.
    if statement.type not in (duckdb.StatementType.SELECT, duckdb.StatementType.MULTI):
        raise ValueError(f"sql: {one_line(query)} is no select; {remedy}")
    [(_, plan)] = connection.execute(f"explain (format json) {query}").fetchall()
    writers = sorted({name for name in _operators(json.loads(plan)) if _WRITERS.search(name)})
    if writers:
        raise ValueError(f"sql: {one_line(query)} would do {writers[0].strip()}; {remedy}")


def _operators(plan: Any) -> set[str]:
    """Return the names of the operators of a query plan."""
    if isinstance(plan, list):
        return {name for part in plan for name in _operators(part)}
    return {str(plan["name"])} | _operators(plan.get("children", []))
