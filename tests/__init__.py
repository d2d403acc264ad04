import os
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]

# Without a GPU, Triton's kernels are interpreted; Triton has to be told before it is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
