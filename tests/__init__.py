import os

import torch

# Without a GPU, Triton's kernels are interpreted; Triton has to be told before it is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
