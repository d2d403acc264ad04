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


def activate(inputs_n2c: Tensor, scale_tc: Tensor, offset_tc: Tensor) -> Tensor:
    """Return the activated product, [n, c], of contiguous inputs with the shapes of `kernels.series_activation`."""
    out_nc = inputs_n2c.new_empty(len(inputs_n2c), scale_tc.shape[1])
    for tokens in _blocks(out_nc):
        gate, up = inputs_n2c[tokens].chunk(2, dim=1)
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
    dtype = torch.promote_types(scale_tc.dtype, torch.float32)
    scale_grad, offset_grad = (torch.zeros_like(scale_tc, dtype=dtype) for _ in range(2))
    for tokens in _blocks(grad_nc):
        gate, up = inputs_n2c[tokens].chunk(2, dim=1)
        gate_grad, up_grad = inputs_grad[tokens].chunk(2, dim=1)
        total_grad = grad_nc[tokens] * up
        for term, (scale, offset) in enumerate(zip(scale_tc, offset_tc, strict=True)):
            z = torch.addcmul(offset, gate, scale)
            z_grad = torch.ops.aten.silu_backward(total_grad, z)
            value = F.silu(z, inplace=True)
            if term == 0:
                up_grad.copy_(value)
                torch.mul(z_grad, scale, out=gate_grad)
            else:
                up_grad += value
                gate_grad.addcmul_(z_grad, scale)
            offset_grad[term] += z_grad.sum(dim=0, dtype=dtype)
            scale_grad[term] += z_grad.mul_(gate).sum(dim=0, dtype=dtype)
        up_grad *= grad_nc[tokens]
    return inputs_grad, scale_grad.to(scale_tc.dtype), offset_grad.to(offset_tc.dtype)


def _blocks(tensor_nc: Tensor) -> Iterator[slice]:
    """Yield slices of tokens, of a size for the device."""
    elements = _CPU_ELEMENTS if tensor_nc.device.type == "cpu" else _ACCELERATOR_ELEMENTS
    step = max(1, elements // tensor_nc.shape[1])
    return (slice(start, start + step) for start in range(0, len(tensor_nc), step))
