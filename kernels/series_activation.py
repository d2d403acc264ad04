"""The series informed activation of a gated feed-forward layer (Wang et al. 2023, arXiv 2312.17276).

Shapes: n tokens, c channels, t terms.
"""

import math
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# reference uses torch's autograd, which saves intermediates of every term; recompute, in plain torch, and triton save
# only the inputs.
ActivationKernel = Literal["reference", "recompute", "triton"]

# Largest silu of the initial offsets: far enough from 0 for terms to differ, far from silu's minimum, -0.278.
_LARGEST_INITIAL_VALUE = 0.1


def series_activation(gate_and_up: Tensor, scale_tc: Tensor, offset_tc: Tensor, kernel: ActivationKernel) -> Tensor:
    """Return (Σ_i silu(a_i x + b_i)) · u, [..., c], in the dtype of the inputs, differentiable.

    gate_and_up: [..., 2 c], float32 or bfloat16, the gate x in its first half, u in its second; scale_tc and
    offset_tc: [t, c], of the same dtype, a and b.
    """
    if kernel == "reference":
        return reference(gate_and_up, scale_tc, offset_tc)
    activated: Tensor = _Fused.apply(gate_and_up, scale_tc, offset_tc, kernel)  # type: ignore[no-untyped-call]
    return activated


def reference(gate_and_up: Tensor, scale_tc: Tensor, offset_tc: Tensor) -> Tensor:
    """Return the same in plain torch."""
    gate, up = gate_and_up.chunk(2, dim=-1)
    terms = [F.silu(scale * gate + offset) for scale, offset in zip(scale_tc, offset_tc, strict=True)]
    return sum(terms[1:], terms[0]) * up


def initial_offsets(terms: int) -> list[float]:
    """Return the initial offsets of the terms: 0 for the first, and for the others such that their silu sums to 0.

    The silu values are pairs of opposite sign, distinct for each pair, since terms with equal initial values get the
    same gradients and stay equal; an unpaired term has 0.
    """
    pairs = (terms - 1) // 2
    values = [_LARGEST_INITIAL_VALUE * pair / pairs for pair in range(1, pairs + 1)]
    offsets = [_inverse_silu(sign * value) for value in values for sign in (1, -1)]
    return [0.0, *offsets, *[0.0] * (terms - 1 - len(offsets))]


def _inverse_silu(value: float) -> float:
    """Return x >= -1 with silu(x) = `value`, by Newton's method."""
    x = 2 * value
    for _ in range(50):
        sigmoid = 1 / (1 + math.exp(-x))
        x -= (x * sigmoid - value) / (sigmoid * (1 + x * (1 - sigmoid)))
    return x


class _Fused(torch.autograd.Function):
    """The activation, whose backward pass recomputes the terms instead of saving them."""

    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor, scale_tc: Tensor, offset_tc: Tensor, kernel: ActivationKernel) -> Tensor:
        ctx.save_for_backward(gate_and_up, scale_tc, offset_tc)
        ctx.module = _module(kernel)
        inputs_n2c = gate_and_up.flatten(0, -2).contiguous()
        out_nc: Tensor = ctx.module.activate(inputs_n2c, scale_tc.contiguous(), offset_tc.contiguous())
        return out_nc.view(*gate_and_up.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        gate_and_up, scale_tc, offset_tc = ctx.saved_tensors
        inputs_n2c, grad_nc = (tensor.flatten(0, -2).contiguous() for tensor in (gate_and_up, grad))
        inputs_grad, scale_grad, offset_grad = ctx.module.gradients(
            inputs_n2c, scale_tc.contiguous(), offset_tc.contiguous(), grad_nc
        )
        return inputs_grad.view_as(gate_and_up), scale_grad, offset_grad, None


def _module(kernel: ActivationKernel) -> ModuleType:
    """Return the module with the kernel's functions `activate` and `gradients`."""
    # Triton is an optional dependency, imported only on request.
    return import_module(f"kernels.series_activation_{kernel}")
