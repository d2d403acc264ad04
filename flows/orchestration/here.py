"""Running a flow in this process: with a server, without Prefect's logs, and with one error after cancellation."""

import atexit
import os
import sys
from collections.abc import Callable
from typing import TypeVar

from flows.run.errors import RanksFailedError

T = TypeVar("T")


def run_here(run_flow: Callable[[], T]) -> T:
    """Return the result of `run_flow`, which imports a flow and calls it.

    The flow uses the configured Prefect server, or a temporary one. Raises RanksFailedError if it is cancelled in
    Prefect.
    """
    # The terminal shows progress and one-line errors instead of Prefect's logs.
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
    # Registered before Prefect's own handlers, so that it runs after them.
    atexit.register(_silence)
    from prefect.exceptions import CancelledRun

    from flows.orchestration.temporary_server import server

    with server():
        try:
            return run_flow()
        except CancelledRun:
            raise RanksFailedError("cancelled in Prefect; the same command resumes from here") from None


def _silence() -> None:
    """Discard what is written to standard error from here on, when the process is about to exit.

    Prefect's threads keep modules alive until the exit, which makes DuckDB's binding write forty lines of warnings.
    """
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
