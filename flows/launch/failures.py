"""The error message for failed ranks: the root cause, shortened, and the path of the log."""

import errno
import os
import re
import shutil
from pathlib import Path
from typing import NoReturn

from flows.launch.log_lines import redact
from flows.run.errors import RanksFailedError
from trainer.rank_errors import root_cause

_CALLS_SHOWN = 4
# With less free space, a rank cannot even start: it reserves space for its error first.
_FEWEST_BYTES = 1 << 20


def raise_failure(errors: Path, state: str, log_path: Path) -> NoReturn:
    """Raise the error of failed ranks, from their records in the folder `errors`.

    state: how the ranks ended, for ranks without a record. Raises ValueError with the rank's own message if the user
    can fix the cause, else RanksFailedError; both name the log. Raises OSError if the disk is full.
    """
    where = f"(log: {log_path})"
    resume = "the same command resumes from the last checkpoint"
    error = root_cause(errors)
    if error is None and shutil.disk_usage(errors).free < _FEWEST_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(errors.parent.parent))
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
