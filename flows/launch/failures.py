"""The error message for failed ranks: the root cause, shortened, and the path of the log."""

import os
import re
from pathlib import Path
from typing import NoReturn

from flows.launch.log_lines import redact
from flows.run.errors import RanksFailedError
from trainer.rank_errors import root_cause

_CALLS_SHOWN = 4


def raise_failure(errors: Path, state: str, log_path: Path) -> NoReturn:
    """Raise the error of failed ranks, from their records in the folder `errors`.

    state: how the ranks ended, for ranks without a record. Raises ValueError with the rank's own message if the user
    can fix the cause, else RanksFailedError; both name the log.
    """
    where = f"(log: {log_path})"
    resume = "the same command resumes from the last checkpoint"
    error = root_cause(errors)
    if error is None:
        raise RanksFailedError(f"the ranks ended without recording an error ({state}); {resume} {where}")
    if error.is_user_error:
        raise ValueError(redact(f"{error.message} {where}", os.environ))
    if error.is_killed:
        raise RanksFailedError(f"{error.message}; {resume} {where}")
    message = f"rank {error.rank}: {error.kind}: {error.message} {where}\n{_innermost(error.traceback)}"
    raise RanksFailedError(redact(message, os.environ))


def _innermost(traceback: str) -> str:
    """Return the innermost calls of a traceback, one line each."""
    calls = re.findall(r'File "(.+)", line (\d+), in (.+)', traceback)
    return "\n".join(f"  {file}:{line} in {function}" for file, line, function in calls[-_CALLS_SHOWN:])
