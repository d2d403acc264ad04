"""Python replacements for what a CPU build of torch lacks: `torch.cuda`, process groups, CUDA's kernel selection."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.optim.optimizer import _foreach_supported_types
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_map_only

from tests.rehearsal.device_tensors import HOST_GROUPS, is_on_device

_DEVICE = torch.device("cuda", 0)
_NUM_DEVICES = 8


def pretend() -> None:
    """Make torch say that there are eight devices, of which the first is current, and that work on them is done."""
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_current_stream_capturing": lambda: False,
        "device_count": lambda: _NUM_DEVICES,
        "current_device": lambda: _DEVICE.index,
        "get_device_capability": lambda device=None: (9, 0),
        "set_device": lambda device: None,
        "manual_seed": lambda seed: None,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "_lazy_init": lambda: None,
    }
    for name, answer in answers.items():
        assert hasattr(torch.cuda, name), name
        setattr(torch.cuda, name, answer)
    torch.nn.Module._apply = _apply  # type: ignore[method-assign]
    FakeTensor.tolist = lambda self: self.cpu().tolist()  # type: ignore[method-assign]
    # Else torch makes tensors out of numbers on the device itself, beneath all modes, and FakeTensors of constants too.
    torch._C._set_only_lift_cpu_tensors(True)
    FakeTensorMode.avoid_device_init = True  # type: ignore[method-assign, assignment]
    # Torch tells by the type whether an optimizer may take all parameters at once.
    _foreach_supported_types.append(FakeTensor)


def join(rank: int, world_size: int, note_sync: Callable[[], None]) -> None:
    """Let torch be one of so many ranks, none of which is there, and have Megatron know that there is no generator.

    note_sync: called where the host waits for all that the device has to do.
    """
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.zeros(16, dtype=torch.uint8)
    random._set_cuda_rng_state = lambda *args, **kwargs: None
    torch.cuda.synchronize = lambda device=None: note_sync()
    initialise, new_group = dist.init_process_group, dist.new_group

    def pretend_to_initialise(backend: str, **options: Any) -> None:
        assert backend == "nccl"
        initialise("fake", rank=rank, world_size=world_size, store=FakeStore(), **options)

    def pretend_to_group(*args: Any, backend: str | None = None, pg_options: Any = None, **options: Any) -> Any:
        group = new_group(*args, backend="fake", **options)
        if backend == "gloo" and group is not dist.GroupMember.NON_GROUP_MEMBER:
            HOST_GROUPS.add(group.group_name)
        return group

    for module in (dist, dist.distributed_c10d):
        module.init_process_group, module.new_group = pretend_to_initialise, pretend_to_group  # type: ignore[assignment]


def _apply(module: torch.nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> torch.nn.Module:
    """Do what `Module._apply` does on CUDA; torch's own would drop what is written on FakeTensors' parameters."""
    for child in module.children() if recurse else ():
        _apply(child, function)
    for name, old in module._parameters.items():
        if old is None:
            continue
        with torch.no_grad():
            new = torch.nn.Parameter(function(old), old.requires_grad)
        for attribute, value in vars(old).items():
            if attribute not in vars(new):
                setattr(new, attribute, value)
        module._parameters[name] = new
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else function(buffer)
    return module


class DeviceFunctions(TorchFunctionMode):
    """Sends functions that torch decides on by the device's build to what it would decide on CUDA.

    note_attention: is given the name of the kernel that scaled dot product attention takes.
    """

    def __init__(self, note_attention: Callable[[str], None]) -> None:
        super().__init__()
        self._note_attention = note_attention

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Return what `func` does on CUDA."""
        kwargs = kwargs or {}
        if func is torch.tensor:
            # It would read the numbers out of tensors beneath all modes.
            args = tree_map_only(FakeTensor, Tensor.item, args)
        elif args and is_on_device(args[0]):
            if func is F.scaled_dot_product_attention:
                return _attend(self._note_attention, *args, **kwargs)
            if func is F.rms_norm:
                return _normalise(*args, **kwargs)
            if func is Tensor.type and len(args) == 1 and not kwargs:
                # That of a FakeTensor is its own class.
                return f"torch.cuda.{torch.empty(0, dtype=args[0].dtype).type().removeprefix('torch.')}"
        return func(*args, **kwargs)


def choose_attention(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool, enable_gqa: bool
) -> SDPBackend:
    """Return the kernel that torch takes on CUDA from sm_80 on, where cuDNN's is not preferred.

    Flash attention takes half precision, heads of up to 256 channels and grouped queries, and no mask; the
    memory-efficient kernel takes masks and float32, and no grouped queries; what is left holds all scores.
    """
    is_square = query.shape[2] == key.shape[2]
    if (
        attn_mask is None
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[3] <= 256
        and (is_square or not is_causal)
    ):
        return SDPBackend.FLASH_ATTENTION
    if not enable_gqa:
        return SDPBackend.EFFICIENT_ATTENTION
    return SDPBackend.MATH


def _attend(
    note_attention: Callable[[str], None],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return what `F.scaled_dot_product_attention` does, which takes the same, by the kernel that is noted."""
    kernel, aten = choose_attention(query, key, attn_mask, is_causal, enable_gqa), torch.ops.aten
    note_attention(kernel.name)
    if kernel is SDPBackend.FLASH_ATTENTION:
        out = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    elif kernel is SDPBackend.EFFICIENT_ATTENTION:
        needs_sums = torch.is_grad_enabled() and query.requires_grad
        # Torch makes a mask of numbers of one of truths.
        bias = attn_mask
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
        if bias is not None:
            bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        out = aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, needs_sums, dropout_p, is_causal, scale=scale
        )[0]
    else:
        out = aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )[0]
    assert isinstance(out, Tensor)
    return out


def _normalise(tensor: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """Return what CUDA's fused norm does; elsewhere torch makes it of products and means, each of which is kept."""
    normalised: Tensor = _FusedNorm.apply(tensor, weight)  # type: ignore[no-untyped-call]
    return normalised


class _FusedNorm(torch.autograd.Function):
    """Keeps its inputs and one number a row, in float32."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(tensor, weight, tensor.new_empty(*tensor.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        tensor, weight, _ = ctx.saved_tensors
        return torch.empty_like(tensor), None if weight is None else torch.empty_like(weight)
