"""Measurements of a program's use of a device: memory, kernels, collectives and host synchronisations."""

import traceback
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.rehearsal.device_tensors import find_tensors, is_on_device

_ATEN = torch.ops.aten
# The caching allocator hands out multiples of that.
_BLOCK = 512
# These allocate or make views; everything else launches something.
_NO_KERNELS = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "alias",
    "lift_fresh",
}
_OF_THE_PROGRAM = ("rehearsal/flaws.py", "trainer/", "kernels/", "megatron/core/", "torch/optim/")


@dataclass
class Part:
    """What a part of a program asked for: bytes at its beginning, at most and at its end, and how often what."""

    begin: int
    peak: int
    end: int = 0
    kernels: Counter[str] = field(default_factory=Counter)
    collectives: Counter[str] = field(default_factory=Counter)
    collective_bytes: Counter[str] = field(default_factory=Counter)
    # Where the host waits for the device: what it asks for, and the innermost lines of the program.
    syncs: Counter[str] = field(default_factory=Counter)
    attention: Counter[str] = field(default_factory=Counter)


class Measurements(TorchDispatchMode):
    """Counts what goes to the device. Enter it after `DeviceTensors`, so that it sees everything first."""

    def __init__(self) -> None:
        super().__init__()
        self._live = 0
        self._sizes: dict[int, int] = {}
        self.part = Part(0, 0)

    @contextmanager
    def measuring(self) -> Iterator[Part]:
        """Yield what the body asks for; parts within it are not counted in it, but for its peak."""
        outer, self.part = self.part, Part(self._live, self._live)
        try:
            yield self.part
        finally:
            self.part.end = self._live
            outer.peak = max(outer.peak, self.part.peak)
            self.part = outer

    def note_sync(self, what: str) -> None:
        """Count a place where the host waits for the device."""
        self.part.syncs[f"{what} at {_place()}"] += 1

    def note_kernel(self, name: str) -> None:
        """Count a kernel that torch does not launch."""
        self.part.kernels[name] += 1

    def note_attention(self, kernel: str) -> None:
        """Count a kernel of scaled dot product attention."""
        self.part.attention[kernel] += 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Return what `func` does, having counted it."""
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and func.namespace == "aten" and func._can_decompose():
            # Elsewhere autograd has taken it apart.
            with self:
                return func.decompose(*args, **kwargs)
        tensors = list(find_tensors((args, *kwargs.values())))
        waiting = find_sync(func, args, kwargs, tensors)
        if waiting is not None:
            self.note_sync(waiting)
        result = func(*args, **kwargs)
        made = [each for each in find_tensors(result) if is_on_device(each)]
        name = func._schema.name.split("::")[1]
        if func.namespace == "c10d" and any(map(is_on_device, tensors)):
            self.part.collectives[name] += 1
            self.part.collective_bytes[name] += sum(each.nbytes for each in tensors)
        elif made and not func.is_view and name not in _NO_KERNELS:
            self.part.kernels[name] += 1
        for each in made:
            self._hold(each)
        return result

    def _hold(self, tensor: Tensor) -> None:
        """Count a tensor's storage for as long as it lives."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._sizes:
            return
        size = -(-storage.nbytes() // _BLOCK) * _BLOCK
        self._sizes[storage._cdata] = size
        self._live += size
        self.part.peak = max(self.part.peak, self._live)
        weakref.finalize(storage, self._release, storage._cdata)

    def _release(self, key: int) -> None:
        self._live -= self._sizes.pop(key)


def find_sync(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]) -> str | None:
    """Return what makes the host wait for the device, if anything does, as torch's `set_sync_debug_mode` has it.

    Those are numbers that are read, copies that are not told to go on by themselves, and results whose size the device
    knows alone.
    """
    are_here = [is_on_device(each) for each in tensors]
    if func is _ATEN._local_scalar_dense.default and any(are_here):
        return "a number is read"
    if func is _ATEN._to_copy.default and not kwargs.get("non_blocking"):
        goes_here = torch.device(kwargs.get("device") or args[0].device).type != "cpu"
        if goes_here != are_here[0]:
            return "a copy to the device" if goes_here else "a copy to the host"
    if (
        func is _ATEN.copy_.default
        and len(set(are_here)) == 2
        and not (args[2:3] == (True,) or kwargs.get("non_blocking"))
    ):
        return "a copy to the device" if are_here[0] else "a copy to the host"
    if func in (_ATEN.index.Tensor, _ATEN.index_put_.default) and are_here[0]:
        indices = [each for each in args[1] if each is not None]
        is_one_of_truths = len(indices) == 1 and indices[0].dtype == torch.bool
        if func is _ATEN.index_put_.default and is_one_of_truths and not is_on_device(args[2]):
            return None  # One number where it is true: torch fills, and need not know how many places that are.
        if any(each.dtype in (torch.bool, torch.uint8) for each in indices):
            return "an index of truths"
        if not all(map(is_on_device, indices)):
            return "an index on the host"
    if func in (_ATEN.nonzero.default, _ATEN.masked_select.default, _ATEN.equal.default) and any(are_here):
        return func._schema.name
    return None


def _place() -> str:
    """Return the innermost lines of the program, the innermost first."""
    frames = [
        f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{line} {frame.f_code.co_name}"
        for frame, line in traceback.walk_stack(None)
        if any(part in frame.f_code.co_filename for part in _OF_THE_PROGRAM)
    ]
    return " < ".join(frames[:3]) or "the backward pass"
