"""Tensors on an absent device, with shapes, dtypes and a device, but no data. Host tensors are real.

Device computations use torch's FakeTensors, which refuse to mix devices, as CUDA does. Copies to the host are real
tensors: the data copied to the device before, if unmodified since, else ones.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

_ATEN = torch.ops.aten
# Numbers that steer the program are few; of more, nobody asks what they were.
_MOST_REMEMBERED = 64
# Names of the process groups over gloo, which takes tensors on the host alone, as NCCL does those on the device.
HOST_GROUPS: set[str] = set()
# Host tensors in memory from which the device copies by itself.
PINNED = WeakTensorKeyDictionary()


def is_on_device(value: Any) -> bool:
    """Return whether `value` is a tensor on the device."""
    return isinstance(value, FakeTensor) and value.fake_device.type != "cpu"


def find_tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in what an operation takes or gives: itself, or lists of them, in lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from find_tensors(each)


class DeviceTensors(TorchDispatchMode):
    """The mode under which tensors on the device have no data."""

    def __init__(self) -> None:
        super().__init__()
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._is_host_fake = False
        self._sent = WeakTensorKeyDictionary()

    @contextmanager
    def without_host_data(self) -> Iterator[None]:
        """Have no data on the host either, where nothing looks at it and there would be too much."""
        self._is_host_fake = True
        try:
            yield
        finally:
            self._is_host_fake = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Return what `func` does, with data where there are any."""
        kwargs = kwargs or {}
        tensors = list(find_tensors((args, *kwargs.values())))
        if func is _ATEN._pin_memory.default:
            PINNED[pinned := args[0].clone()] = True
            return pinned
        if func.namespace == "c10d":
            return self._communicate(func, args, kwargs, tensors)
        device = kwargs.get("device")
        goes_to_device = device is not None and torch.device(device).type != "cpu"
        is_made = self._is_host_fake and not tensors
        if not (goes_to_device or is_made or any(isinstance(each, FakeTensor) for each in tensors)):
            return func(*args, **kwargs)
        if func is _ATEN._local_scalar_dense.default and any(map(is_on_device, tensors)):
            return self._read(args[0]).item()
        if not self._is_host_fake and any(map(is_on_device, tensors)):
            if func is _ATEN._to_copy.default and device is not None and not goes_to_device:
                return self._read(args[0]).to(kwargs.get("dtype") or args[0].dtype)
            if func is _ATEN.copy_.default and not is_on_device(args[0]):
                return args[0].copy_(self._read(args[1]))
        with self._mode:
            result = func(*args, **kwargs)
        self._note(func, args, result)
        return result

    def _communicate(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
        """Return what a collective does: on the host, ranks have what this one has; on the device nobody has data."""
        group = _find_group(args)
        _check_collective(func, group, tensors)
        if not any(isinstance(each, FakeTensor) for each in tensors):
            return func(*args, **kwargs)
        if group.size() > 1:
            for each in tensors:
                self._sent.pop(each, None)
        work = FakeWork().boxed()
        return work if len(func._schema.returns) == 1 else (args[0], work)

    def _read(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the device as the host gets it."""
        sent = self._sent.get(tensor)
        return torch.ones(tensor.shape, dtype=tensor.dtype) if sent is None else sent.clone()

    def _note(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        """Remember a few numbers that were sent to the device, and forget those that are overwritten."""
        if func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.is_write and isinstance(value, Tensor):
                    self._sent.pop(value, None)
        copied = func in (_ATEN._to_copy.default, _ATEN.copy_.default)
        source = args[1] if func is _ATEN.copy_.default else args[0] if copied else None
        if copied and not isinstance(source, FakeTensor) and source.numel() <= _MOST_REMEMBERED:
            self._sent[result] = source.to(result.dtype).clone()


def _find_group(args: tuple[Any, ...]) -> dist.ProcessGroup:
    """Return the group among a collective's arguments, whose place differs."""
    boxed = next(value for value in args if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value))
    return dist.ProcessGroup.unbox(boxed)


def _check_collective(func: Any, group: dist.ProcessGroup, tensors: list[Tensor]) -> None:
    """Raise RuntimeError where a collective is given tensors that its backend does not take.

    What torch itself makes it puts where the backend wants it: the tensors of objects and of barriers.
    """
    if func is torch.ops.c10d.barrier.default:
        return
    is_hosts = group.group_name in HOST_GROUPS
    wrong = [str(each.device) for each in tensors if is_on_device(each) == is_hosts]
    if wrong and not any("_object" in frame.name for frame in traceback.extract_stack()):
        raise RuntimeError(f"{func} over {'gloo' if is_hosts else 'NCCL'} was given tensors on {', '.join(wrong)}")
