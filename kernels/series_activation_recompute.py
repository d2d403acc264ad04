"""The series informed activation in plain torch, for any device: nothing but the inputs is saved between the passes.

Both passes go block by block of tokens, so that intermediates stay in a CPU's cache.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# The most elements of an intermediate result: on a CPU, 256 KiB in float32, so that a few fit into its cache; on an
# accelerator, enough to occupy it.
_CPU_ELEMENTS = 1 << 16
_ACCELERATOR_ELEMENTS = 1 << 27
# Intermediate results of a block in `gradients`: gradient of the sum of the terms, input of a term, and its gradient.
_NUM_INTERMEDIATES = 3
# The bytes of an element in float32.
_SINGLE = 4


def activate(inputs_n2c: Tensor, scale_tc: Tensor, offset_tc: Tensor) -> Tensor:
    """Return the activated product, [n, c], of contiguous inputs with the shapes of `kernels.series_activation`."""
    out_nc = inputs_n2c.new_empty(len(inputs_n2c), scale_tc.shape[1])
    dtype = _dtype_within_blocks(inputs_n2c)
    scale_tc, offset_tc = scale_tc.to(dtype), offset_tc.to(dtype)
    for tokens in _blocks(out_nc):
        gate, up = inputs_n2c[tokens].to(dtype).chunk(2, dim=1)
        terms = zip(scale_tc, offset_tc, strict=True)
        values = (F.silu(torch.addcmul(offset, gate, scale), inplace=True) for scale, offset in terms)
        total = next(values)
        for value in values:
            total += value
        torch.mul(total, up, out=out_nc[tokens])
    return out_nc


def gradients(
    inputs_n2c: Tensor, scale_tc: Tensor, offset_tc: Tensor, grad_nc: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of inputs, [n, 2 c], scales and offsets, [t, c], in their dtypes; all contiguous.

    Sums over tokens are accumulated in float32 at least, in a fixed order.
    """
    inputs_grad = torch.empty_like(inputs_n2c)
    sum_dtype, dtype = torch.promote_types(scale_tc.dtype, torch.float32), _dtype_within_blocks(inputs_n2c)
    scale_grad, offset_grad = (torch.zeros_like(scale_tc, dtype=sum_dtype) for _ in range(2))
    scales, offsets = scale_tc.to(dtype), offset_tc.to(dtype)
    for tokens in _blocks(grad_nc):
        inputs, grad = inputs_n2c[tokens].to(dtype), grad_nc[tokens].to(dtype)
        block_grad = inputs_grad[tokens] if dtype == inputs_grad.dtype else torch.empty_like(inputs)
        gate, up = inputs.chunk(2, dim=1)
        gate_grad, up_grad = block_grad.chunk(2, dim=1)
        total_grad = grad * up
        z, z_grad = torch.empty_like(total_grad), torch.empty_like(total_grad)
        for term, (scale, offset) in enumerate(zip(scales, offsets, strict=True)):
            torch.addcmul(offset, gate, scale, out=z)
            torch.ops.aten.silu_backward.grad_input(total_grad, z, grad_input=z_grad)
            value = F.silu(z, inplace=True)
            if term == 0:
                up_grad.copy_(value)
                torch.mul(z_grad, scale, out=gate_grad)
            else:
                up_grad += value
                gate_grad.addcmul_(z_grad, scale)
            offset_grad[term] += z_grad.sum(dim=0, dtype=sum_dtype)
            scale_grad[term] += z_grad.mul_(gate).sum(dim=0, dtype=sum_dtype)
        up_grad *= grad
        if block_grad.dtype != inputs_grad.dtype:
            inputs_grad[tokens] = block_grad
    return inputs_grad, scale_grad.to(scale_tc.dtype), offset_grad.to(offset_tc.dtype)


def workspace_bytes(is_accelerator: bool, element_bytes: int, num_tokens: int, width: int) -> int:
    """Return the bytes of the intermediate results of `gradients`, for inputs of [num_tokens, 2 `width`].

    element_bytes: the bytes of an element of the inputs.
    """
    elements, size = (_ACCELERATOR_ELEMENTS, element_bytes) if is_accelerator else (_CPU_ELEMENTS, _SINGLE)
    return _NUM_INTERMEDIATES * min(num_tokens * width, elements) * size


def _dtype_within_blocks(tensor: Tensor) -> torch.dtype:
    """Return the dtype of intermediate results: on a CPU float32 at least, in which its operations are faster."""
    return torch.promote_types(tensor.dtype, torch.float32) if tensor.device.type == "cpu" else tensor.dtype


def _blocks(tensor_nc: Tensor) -> Iterator[slice]:
    """Yield slices of tokens, of a size for the device."""
    elements = _CPU_ELEMENTS if tensor_nc.device.type == "cpu" else _ACCELERATOR_ELEMENTS
    step = max(1, elements // tensor_nc.shape[1])
    return (slice(start, start + step) for start in range(0, len(tensor_nc), step))
