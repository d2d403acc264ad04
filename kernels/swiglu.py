"""The activation of a gated feed-forward layer, SwiGLU (Shazeer 2020, arXiv 2002.05202), in plain torch.

Shapes: c channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_and_up: Tensor) -> Tensor:
    """Return silu(x) · u, [..., c], differentiable; the backward pass needs only the inputs.

    gate_and_up: [..., 2 c], the gate x in its first half, u in its second.
    """
    activated: Tensor = _Activate.apply(gate_and_up)  # type: ignore[no-untyped-call]
    return activated


class _Activate(torch.autograd.Function):
    """The activation, whose backward pass computes the silu again instead of saving it."""

    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        gate, up = gate_and_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_and_up,) = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        inputs_grad = torch.empty_like(gate_and_up)
        gate_grad, up_grad = inputs_grad.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=up_grad)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=gate_grad)
        return inputs_grad
