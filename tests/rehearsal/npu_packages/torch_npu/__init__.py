"""A stand-in for torch_npu: devices in host memory, of the library that SIMULATED_NPU names, and HCCL over gloo."""

import os
from types import SimpleNamespace

import torch

torch.ops.load_library(os.environ["SIMULATED_NPU"])
torch.utils.rename_privateuse1_backend("npu")

from torch_npu import npu  # noqa: E402 -- the device has its name by now

torch._register_device_module("npu", npu)
torch.utils.generate_methods_for_privateuse1_backend(for_tensor=True, for_module=True)

from torch_npu import hccl  # noqa: E402, F401

# Where MindSpeed looks for what can be said of a group.
_C = SimpleNamespace(_distributed_c10d=SimpleNamespace(ProcessGroupHCCL=SimpleNamespace(Options=object)))
unsupported_dtype: list[torch.dtype] = []
