"""Torchrun, as a process that ends with its parent: `python -m trainer.agent` takes torchrun's arguments.

The last argument is the job's file. A rank that is killed by a signal cannot write its error; the agent writes it.

The agent runs in its own session, so that signals to the launcher's group do not reach it: the launcher tells it to
stop, once. When the launcher ends, the agent receives another signal, which torchrun would forward to ranks that are
saving.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

# Torchrun ends the other ranks with SIGTERM; a rank that has lost another aborts itself.
_CONSEQUENCES = (signal.SIGTERM, signal.SIGABRT)


def _ignore_repeated_signals() -> None:
    from torch.distributed.elastic.multiprocessing import api

    terminate = api._terminate_process_handler

    def terminate_once(signum: int, frame: FrameType | None) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)
        terminate(signum, frame)

    # Torchrun looks the handler up when it starts ranks.
    api._terminate_process_handler = terminate_once


def killed_rank(error: ChildFailedError) -> tuple[int, ProcessFailure] | None:
    """Return the rank of this host that a signal killed before torchrun ended the others, or None.

    Torchrun polls ten times a second and lists failures by rank: among ranks that failed at the same time, a killed
    rank takes precedence over one that reports a lost connection.
    """
    first_rank, first = error.get_first_failure()
    for rank, failure in error.failures.items():
        # Ranks that torchrun kills after its timeout fail later.
        is_simultaneous = failure.timestamp <= first.timestamp + 1
        if failure.exitcode < 0 and -failure.exitcode not in _CONSEQUENCES and is_simultaneous:
            return rank, failure
    return (first_rank, first) if first.exitcode < 0 else None


def _report_killed(error: ChildFailedError, job_path: Path) -> None:
    from trainer.job import read_job
    from trainer.rank_errors import errors_beside, killed, leave_error

    found = killed_rank(error)
    if found is not None:
        rank, failure = found
        try:
            errors = read_job(job_path).errors
        except ValueError:
            errors = errors_beside(job_path)
        leave_error(errors, killed(rank, -failure.exitcode, failure.timestamp))


if __name__ == "__main__":
    from torch.distributed.run import main

    _ignore_repeated_signals()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    code = 0
    try:
        try:
            main()
        except ChildFailedError as error:
            _report_killed(error, Path(sys.argv[-1]))
            raise
    except BaseException:  # noqa: BLE001 - printed; the process exits below
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # After a signal, the threads that copy the ranks' output may still run; an ordinary exit would wait for them.
    os._exit(code)
