"""Megatron-Core: devices, model, training, scoring, checkpoints."""

import os

# `import torch` loads the backend packages of all installed devices, and fails if one of them is broken, as torch_npu
# is without CANN. `trainer.devices` loads only the requested one and reports what is wrong with it.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
