"""The series informed activation of a gated feed-forward layer (Wang et al. 2023, arXiv 2312.17276).

Shapes: n tokens, c channels, t terms.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# reference is torch's autograd, which keeps intermediates of every term; triton keeps the inputs alone.
ActivationKernel = Literal["reference", "triton"]


def series_activation(gate_and_up: Tensor, scale_tc: Tensor, offset_tc: Tensor, kernel: ActivationKernel) -> Tensor:
    """Return (Σ_i silu(a_i x + b_i)) · u, [..., c], in the dtype of the inputs, differentiable.

    gate_and_up: [..., 2 c], float32 or bfloat16, the gate x in its first half, u in its second; scale_tc and
    offset_tc: [t, c], of the same dtype, a and b.
    """
    if kernel == "reference":
        return reference(gate_and_up, scale_tc, offset_tc)
    activated: Tensor = _Fused.apply(gate_and_up, scale_tc, offset_tc)  # type: ignore[no-untyped-call]
    return activated


def reference(gate_and_up: Tensor, scale_tc: Tensor, offset_tc: Tensor) -> Tensor:
    """Return the same in plain torch."""
    gate, up = gate_and_up.chunk(2, dim=-1)
    terms = [F.silu(scale * gate + offset) for scale, offset in zip(scale_tc, offset_tc, strict=True)]
    return sum(terms[1:], terms[0]) * up


class _Fused(torch.autograd.Function):
    """The activation whose backward pass computes the terms again rather than keeping them."""

    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor, scale_tc: Tensor, offset_tc: Tensor) -> Tensor:
        # Triton is an extra: it is imported where it was asked for.
        from kernels import series_activation_triton as triton

        ctx.save_for_backward(gate_and_up, scale_tc, offset_tc)
        inputs_n2c = gate_and_up.flatten(0, -2).contiguous()
        out_nc = triton.activate(inputs_n2c, scale_tc.contiguous(), offset_tc.contiguous())
        return out_nc.view(*gate_and_up.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        from kernels import series_activation_triton as triton

        gate_and_up, scale_tc, offset_tc = ctx.saved_tensors
        inputs_n2c, grad_nc = (tensor.flatten(0, -2).contiguous() for tensor in (gate_and_up, grad))
        inputs_grad, scale_grad, offset_grad = triton.gradients(
            inputs_n2c, scale_tc.contiguous(), offset_tc.contiguous(), grad_nc
        )
        return inputs_grad.view_as(gate_and_up), scale_grad, offset_grad
