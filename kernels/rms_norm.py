"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467) in plain torch, for devices without a fused kernel of it.

Shapes: h channels. Torch's own composition saves the input in single precision and the normalised input, and its
backward pass takes twice as many operations.
"""

from typing import Any, cast

import torch
from torch import Tensor


def rms_norm(inputs: Tensor, weight_h: Tensor | None, epsilon: float) -> Tensor:
    """Return x / √(mean(x²) + epsilon) · w, [..., h], in the dtype of the inputs, differentiable.

    inputs: [..., h]; weight_h: [h], of the same dtype; None: ones. Half precision is computed in
    single.
    """
    normalised: Tensor = _Normalise.apply(inputs, weight_h, epsilon)  # type: ignore[no-untyped-call]
    return normalised


class _Normalise(torch.autograd.Function):
    """The norm, which saves its input and one value per row for the backward pass."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight_h: Tensor | None, epsilon: float) -> Tensor:
        dtype = torch.promote_types(inputs.dtype, torch.float32)
        norm = torch.linalg.vector_norm(inputs, dim=-1, keepdim=True, dtype=dtype)
        scale = norm.square_().div_(inputs.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(inputs, weight_h, scale)
        normalised = inputs * scale
        if weight_h is not None:
            normalised *= weight_h
        return cast(Tensor, normalised.to(inputs.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        inputs, weight_h, scale = ctx.saved_tensors
        normalised = inputs * scale
        product = normalised * grad
        weight_grad = None
        if weight_h is not None and ctx.needs_input_grad[1]:
            weight_grad = product.flatten(0, -2).sum(dim=0).to(weight_h.dtype)
        if not ctx.needs_input_grad[0]:
            return None, weight_grad, None
        if weight_h is None:
            along, weighted = product.sum(dim=-1), product.copy_(grad)
        else:
            factor_h = weight_h.to(product.dtype)
            along, weighted = product @ factor_h, torch.mul(grad, factor_h, out=product)
        # The gradient's part along the input changes nothing.
        mean = along[..., None] / inputs.shape[-1]
        return weighted.addcmul_(normalised, mean, value=-1).mul_(scale).to(inputs.dtype), weight_grad, None
