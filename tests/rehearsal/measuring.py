"""Measurements of a program's use of a device: memory, kernels, collectives and host synchronisations."""

import traceback
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.rehearsal.device_tensors import PINNED, find_tensors, is_on_device

_ATEN = torch.ops.aten
# The caching allocator hands out multiples of that.
_BLOCK = 512
# These allocate or make views; everything else launches a kernel.
_NO_KERNELS = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "alias",
    "lift_fresh",
    "_unsafe_view",
    "_reshape_alias",
}
# These overwrite their first argument without reading it.
_OVERWRITING = {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_"}
_OF_THE_PROGRAM = ("rehearsal/flaws.py", "trainer/", "kernels/", "megatron/core/", "torch/optim/")


@dataclass
class Part:
    """What a part of a program asked for: bytes at its beginning, at most and at its end, and how often what.

    moved: bytes that each kernel reads and writes, counting every tensor that it takes or returns as a whole.
    """

    begin: int
    peak: int
    end: int = 0
    kernels: Counter[str] = field(default_factory=Counter)
    moved: Counter[str] = field(default_factory=Counter)
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
        elif not func.is_view and name not in _NO_KERNELS:
            written = _distinct([*made, *_mutated(func, args)])
            if written:
                read = _distinct(find_tensors((args[1:] if name in _OVERWRITING else args, *kwargs.values())))
                self.part.kernels[name] += 1
                self.part.moved[name] += sum(map(_num_bytes, written)) + sum(map(_num_bytes, read))
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


def _mutated(func: Any, args: tuple[Any, ...]) -> Iterator[Tensor]:
    """Yield the tensors that an operation changes in place; those of lists are not among its results."""
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.is_write:
            yield from find_tensors(value)


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the tensors that are on the device, each once."""
    return list({id(each): each for each in tensors if is_on_device(each)}.values())


def _num_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements; those of an expanded one are repeated, and count once."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def find_sync(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]) -> str | None:
    """Return what makes the host wait for the device, if anything does, as torch's `set_sync_debug_mode` has it.

    Those are numbers that are read, copies that are not told to go on by themselves or come from memory that is not
    pinned, and results whose size the device knows alone.
    """
    are_here = [is_on_device(each) for each in tensors]
    if func is _ATEN._local_scalar_dense.default and any(are_here):
        return "a number is read"
    if func is _ATEN._to_copy.default:
        goes_here = torch.device(kwargs.get("device") or args[0].device).type != "cpu"
        is_by_itself = kwargs.get("non_blocking") and (not goes_here or args[0] in PINNED)
        if goes_here != are_here[0] and not is_by_itself:
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
