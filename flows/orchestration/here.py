"""Running a flow in this process: with a server, without Prefect's logs, and with one error after cancellation."""

import os
import sys
from collections.abc import Callable
from typing import Any, ParamSpec

from flows.orchestration.temporary_server import starting_server
from flows.run.errors import RanksFailedError

P = ParamSpec("P")


def run_here(import_flow: Callable[[], Callable[P, Any]], *arguments: P.args, **named: P.kwargs) -> Any:
    """Return the result of the flow that `import_flow` imports and returns, called with the arguments.

    The flow uses the configured Prefect server, or a temporary one, which starts while the flow is imported. Raises
    RanksFailedError if the flow is cancelled in Prefect.
    """
    # The terminal shows progress and one-line errors instead of Prefect's logs.
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
    print("starting Prefect", file=sys.stderr, flush=True)
    with starting_server() as ready:
        flow = import_flow()
        from prefect.exceptions import CancelledRun

        with ready():
            try:
                return flow(*arguments, **named)
            except CancelledRun:
                raise RanksFailedError("cancelled in Prefect; the same command resumes from here") from None
