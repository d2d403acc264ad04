"""Megatron-Core: devices, model, training, scoring, checkpoints."""

import os

# `import torch` loads the packages of all devices that are installed, and fails where one of them is broken, as
# torch_npu is without CANN. `trainer.devices` loads the one that is asked for, and says what is wrong with it.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
