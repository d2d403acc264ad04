"""Torchrun, as a process that ends with whoever started it: `python -m trainer.agent` takes torchrun's arguments.

It runs in a session of its own, so that a signal to its launcher's group does not reach it as well: the launcher tells
it to stop, once, and a second signal would keep ranks from saving.
"""

import ctypes
import signal
import sys

if __name__ == "__main__":
    from torch.distributed.run import main

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    main()
