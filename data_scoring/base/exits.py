"""Ending a process without taking down what it has imported, which takes a second for torch or Prefect."""

import atexit
import os
import sys
from collections.abc import Callable
from typing import NoReturn


def exit_with(main: Callable[[], int | None]) -> NoReturn:
    """End this process with the status that `main` returns, or 1 if it raises an exception, which Python prints.

    Threads are joined and functions of `atexit` are called as usual, but then the process ends at once. Python would
    also delete all modules, while threads of Prefect still use some, about which DuckDB's binding prints warnings.
    """
    status = 1

    def end() -> None:
        # Streams that were closed when the process started are None. What was on its way to a full disk or a closed
        # pipe is lost, which Python, too, takes for a failure.
        is_lost = False
        for stream in filter(None, (sys.stdout, sys.stderr)):
            try:
                stream.flush()
            except OSError:
                is_lost = True
        os._exit(status or int(is_lost))

    # Python calls the last one first.
    atexit.register(end)
    try:
        status = main() or 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    sys.exit(status)
