"""Torchrun, as a process that ends with whoever started it: `python -m trainer.agent` takes torchrun's arguments.

It runs in a session of its own, so that a signal to its launcher's group does not reach it as well: the launcher tells
it to stop, once. Torchrun would pass a second signal on to ranks that are saving, as the launcher's end is one.
"""

import ctypes
import os
import signal
import sys
from types import FrameType


def _heed_one_signal() -> None:
    from torch.distributed.elastic.multiprocessing import api

    terminate = api._terminate_process_handler

    def terminate_once(signum: int, frame: FrameType | None) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)
        terminate(signum, frame)

    # Torchrun looks it up when it starts ranks.
    api._terminate_process_handler = terminate_once


if __name__ == "__main__":
    from torch.distributed.run import main

    _heed_one_signal()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    code = 0
    try:
        main()
    except BaseException:  # noqa: BLE001 - it is printed, and nothing comes after it
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # A signal can leave the threads that copy the ranks' output running, and an ordinary exit would wait for them.
    os._exit(code)
