"""The tests; processes beside that of pytest import from here, too, and start faster without torch."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Without a GPU, Triton's kernels are interpreted; Triton has to be told before it is first imported. Other processes
# inherit it.
if "pytest" in sys.modules:
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
