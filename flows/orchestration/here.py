"""A flow run in this process: with a server, quietly, and with one error where it was cancelled."""

import atexit
import os
import sys
from collections.abc import Callable
from typing import TypeVar

from flows.run.rank_errors import RanksFailedError

T = TypeVar("T")


def run_here(run_flow: Callable[[], T]) -> T:
    """Return what `run_flow` returns, which imports a flow and calls it.

    The flow talks to the configured Prefect server, or to a temporary one. Raises RanksFailedError where it is
    cancelled in Prefect.
    """
    # On a terminal the progress says what is going on, and one line says what went wrong.
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
    # Registered before Prefect's own handlers, it runs after them.
    atexit.register(_silence)
    from prefect.exceptions import CancelledRun

    from flows.orchestration.temporary_server import server

    with server():
        try:
            return run_flow()
        except CancelledRun:
            raise RanksFailedError("cancelled in Prefect; the same command goes on from here") from None


def _silence() -> None:
    """Drop what is written to standard error from here on: everything was said, and the process is at its end.

    Prefect's threads keep modules alive until then, about which DuckDB's binding writes forty lines.
    """
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
