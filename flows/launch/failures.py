"""What the user reads when ranks fail: the error that the others follow from, short, and where the log is."""

import os
import re
from pathlib import Path
from typing import NoReturn

from flows.launch.log_lines import redact
from flows.run.rank_errors import RanksFailedError
from trainer.rank_errors import root_cause

_CALLS_SHOWN = 4


def raise_failure(errors: Path, state: str, log_path: Path) -> NoReturn:
    """Raise for ranks that failed, by what they left in the folder `errors`.

    state: how they ended, for ranks that left nothing. Raises ValueError with the rank's own message where the user
    can mend what is wrong, else RanksFailedError; both name the log.
    """
    where = f"(log: {log_path})"
    goes_on = "the same command goes on from the last checkpoint"
    error = root_cause(errors)
    if error is None:
        raise RanksFailedError(f"the ranks ended and left no error ({state}); {goes_on} {where}")
    if error.is_user_error:
        raise ValueError(redact(f"{error.message} {where}", os.environ))
    if error.is_killed:
        raise RanksFailedError(f"{error.message}; {goes_on} {where}")
    message = f"rank {error.rank}: {error.kind}: {error.message} {where}\n{_innermost(error.traceback)}"
    raise RanksFailedError(redact(message, os.environ))


def _innermost(traceback: str) -> str:
    """Return the last calls of a traceback, a line each: where a rank failed, without what led there."""
    calls = re.findall(r'File "(.+)", line (\d+), in (.+)', traceback)
    return "\n".join(f"  {file}:{line} in {function}" for file, line, function in calls[-_CALLS_SHOWN:])
