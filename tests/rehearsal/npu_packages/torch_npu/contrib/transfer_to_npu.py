"""What torch_npu's module of this name does: whatever asks for CUDA is given the NPU."""

from typing import Any

import torch
import torch.cuda.random
from torch.overrides import TorchFunctionMode

from torch_npu import npu

_DEVICE = torch.device("npu", 0)


class _CudaMeansNpu(TorchFunctionMode):
    """Sends every tensor that is asked for on `cuda`, or on a device by its number, to the NPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _DEVICE}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _DEVICE, *args[2:])
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) or (isinstance(device, str) and device.startswith("cuda"))


for _name in (
    "current_device", "current_stream", "default_generators", "device", "device_count", "get_device_name",
    "get_rng_state",
    "is_available", "is_initialized", "manual_seed", "manual_seed_all", "mem_get_info", "set_device", "set_rng_state",
    "synchronize", "Event", "Stream", "_lazy_call", "_lazy_init",
):  # fmt: skip
    setattr(torch.cuda, _name, getattr(npu, _name))
for _name in ("get_rng_state", "set_rng_state", "_lazy_init"):
    setattr(torch.cuda.random, _name, getattr(npu, _name))
torch._C._cuda_getDevice = npu.current_device
torch.Tensor.cuda = lambda self, *_, **__: self.to(_DEVICE)
torch.nn.Module.cuda = lambda self, *_, **__: self.to(_DEVICE)
_CudaMeansNpu().__enter__()
