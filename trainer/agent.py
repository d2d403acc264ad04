"""Torchrun, as a process that ends with whoever started it: `python -m trainer.agent` takes torchrun's arguments.

The last argument is the job's file. A rank that a signal ends leaves no error; it is left here in its place.

The agent runs in a session of its own, so that a signal to its launcher's group does not reach it as well: the launcher
tells it to stop, once. Torchrun would pass a second signal on to ranks that are saving, as the launcher's end is one.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

# What torchrun ends the other ranks with, and what a rank ends itself with once it has lost another.
_CONSEQUENCES = (signal.SIGTERM, signal.SIGABRT)


def _heed_one_signal() -> None:
    from torch.distributed.elastic.multiprocessing import api

    terminate = api._terminate_process_handler

    def terminate_once(signum: int, frame: FrameType | None) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)
        terminate(signum, frame)

    # Torchrun looks it up when it starts ranks.
    api._terminate_process_handler = terminate_once


def killed_rank(error: ChildFailedError) -> tuple[int, ProcessFailure] | None:
    """Return the rank of this host that a signal ended before torchrun ended the others, or None.

    Torchrun looks ten times a second and lists what it finds by rank: of ranks that failed at once, one that was killed
    counts before one that reports a lost connection.
    """
    first_rank, first = error.get_first_failure()
    for rank, failure in error.failures.items():
        # What torchrun kills after its patience has run out comes later.
        is_at_once = failure.timestamp <= first.timestamp + 1
        if failure.exitcode < 0 and -failure.exitcode not in _CONSEQUENCES and is_at_once:
            return rank, failure
    return (first_rank, first) if first.exitcode < 0 else None


def _leave_killed(error: ChildFailedError, job_path: Path) -> None:
    from trainer.job import read_job
    from trainer.rank_errors import killed, leave_error

    found = killed_rank(error)
    if found is not None:
        rank, failure = found
        leave_error(read_job(job_path).errors, killed(rank, -failure.exitcode, failure.timestamp))


if __name__ == "__main__":
    from torch.distributed.run import main

    _heed_one_signal()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    code = 0
    try:
        try:
            main()
        except ChildFailedError as error:
            _leave_killed(error, Path(sys.argv[-1]))
            raise
    except BaseException:  # noqa: BLE001 - it is printed, and nothing comes after it
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # A signal can leave the threads that copy the ranks' output running, and an ordinary exit would wait for them.
    os._exit(code)
