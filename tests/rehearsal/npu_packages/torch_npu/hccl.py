"""HCCL over gloo: it takes device tensors alone, and of types those that HCCL has."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

_on_host = torch.ops.simulated_npu.on_host
# Of what HCCL moves, it adds up no bytes; float64, which it moves on some devices, is left out.
_REDUCED = {torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.bfloat16}
_MOVED = _REDUCED | {torch.uint8, torch.bool}


class Hccl(dist.ProcessGroup):
    """A group of ranks whose device tensors gloo exchanges, on the memory that they are in."""

    def __init__(self, rank: int, size: int, gloo: Any) -> None:
        super().__init__(rank, size)
        self._gloo = gloo

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("npu")]

    def _get_backend(self, _: torch.device) -> Any:
        return self._gloo

    def getBackendName(self) -> str:  # noqa: N802 -- torch's name
        return "hccl"

    def size(self) -> int:
        return self._gloo.size()

    def rank(self) -> int:
        return self._gloo.rank()

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Any:
        return self._gloo.allreduce(_reduced(tensors), opts or dist.AllreduceOptions())

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> Any:
        return self._gloo.allreduce_coalesced(_reduced(tensors), opts or dist.AllreduceCoalescedOptions())

    def reduce(self, tensors: list[Tensor], opts: Any = None) -> Any:
        return self._gloo.reduce(_reduced(tensors), opts)

    def reduce_scatter_single(self, output: Tensor, given: Tensor, opts: Any = None) -> Any:
        return self.reduce_scatter_single_coalesced([output], [given], opts)

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], given: list[Tensor], opts: Any = None) -> Any:
        opts = opts or dist.ReduceScatterOptions()
        return _together(self._gloo._reduce_scatter_base, _reduced(outputs), _reduced(given), opts)

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> Any:
        return self._gloo.broadcast(_moved(tensors), opts)

    def allgather(self, outputs: list[list[Tensor]], given: list[Tensor], opts: Any = None) -> Any:
        return self._gloo.allgather([*map(_moved, outputs)], _moved(given), opts or dist.AllgatherOptions())

    def all_gather_single(self, output: Tensor, given: Tensor, opts: Any = None) -> Any:
        return self.all_gather_single_coalesced([output], [given], opts)

    def all_gather_single_coalesced(self, outputs: list[Tensor], given: list[Tensor], opts: Any = None) -> Any:
        opts = opts or dist.AllgatherOptions()
        return _together(self._gloo._allgather_base, _moved(outputs), _moved(given), opts)

    def gather(self, outputs: list[list[Tensor]], given: list[Tensor], opts: Any = None) -> Any:
        return self._gloo.gather([*map(_moved, outputs)], _moved(given), opts)

    def scatter(self, outputs: list[Tensor], given: list[list[Tensor]], opts: Any = None) -> Any:
        return self._gloo.scatter(_moved(outputs), [*map(_moved, given)], opts)

    def send(self, tensors: list[Tensor], rank: int, tag: int = 0) -> Any:
        return self._gloo.send(_moved(tensors), rank, tag)

    def recv(self, tensors: list[Tensor], rank: int, tag: int = 0) -> Any:
        return self._gloo.recv(_moved(tensors), rank, tag)

    def barrier(self, opts: Any = None) -> Any:
        return self._gloo.barrier()


def _together(collective: Any, outputs: list[Tensor], given: list[Tensor], opts: Any) -> Any:
    """Return the work of the last of several collectives, all others being done."""
    *others, last = [collective(output, part, opts) for output, part in zip(outputs, given, strict=True)]
    for work in others:
        work.wait()
    return last


def _reduced(tensors: list[Tensor]) -> list[Tensor]:
    return _checked(tensors, _REDUCED, "reduce")


def _moved(tensors: list[Tensor]) -> list[Tensor]:
    return _checked(tensors, _MOVED, "move")


def _checked(tensors: list[Tensor], types: set[torch.dtype], what: str) -> list[Tensor]:
    """Return the tensors as those of the host. Raises RuntimeError where HCCL would not take them."""
    for tensor in tensors:
        if tensor.device.type != "npu":
            raise RuntimeError(f"hccl takes device tensors, and one is on {tensor.device}")
        if tensor.dtype not in types:
            raise RuntimeError(f"hccl does not {what} {tensor.dtype}")
        if not tensor.is_contiguous():
            raise RuntimeError("hccl takes contiguous tensors alone")
    return [_on_host(tensor) for tensor in tensors]


def _create(common: Any, _: Any) -> Hccl:
    gloo_class = distributed_c10d.ProcessGroupGloo
    options = gloo_class._Options()
    options._devices = [gloo_class.create_default_device()]
    options._timeout, options._threads = common.timeout, 2
    gloo = gloo_class(common.store, common.group_rank, common.group_size, options)
    return Hccl(common.group_rank, common.group_size, gloo)


dist.Backend.register_backend("hccl", _create, extended_api=True, devices=["npu"])
