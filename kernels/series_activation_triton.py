"""The series informed activation in Triton: one pass over the inputs per direction, in float32, nothing saved between.

Each program takes a tile of tokens and channels. The gradients of scales and offsets are sums over all tokens: each
program writes the sums of its tile, and torch adds them in a fixed order. Run so far only in Triton's interpreter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tiles small enough for two programs to fit into the registers of an H100's multiprocessor, and large enough that
# writing the gradient sums is cheap compared to reading the inputs.
_BLOCK_N = 32
_BLOCK_C = 64
_NUM_WARPS = 8


@triton.jit
def _activate(
    inputs, scales, offsets, out, num_tokens, width,
    TERMS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channels < width
    is_inside = (tokens < num_tokens)[:, None] & is_channel[None, :]
    at = tokens[:, None].to(tl.int64) * 2 * width + channels[None, :]
    gate = tl.load(inputs + at, mask=is_inside, other=0.0).to(tl.float32)
    up = tl.load(inputs + at + width, mask=is_inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    for term in tl.static_range(TERMS):
        scale = tl.load(scales + term * width + channels, mask=is_channel, other=0.0).to(tl.float32)
        offset = tl.load(offsets + term * width + channels, mask=is_channel, other=0.0).to(tl.float32)
        z = scale[None, :] * gate + offset[None, :]
        total += z * tl.sigmoid(z)
    place = tokens[:, None].to(tl.int64) * width + channels[None, :]
    tl.store(out + place, (total * up).to(out.dtype.element_ty), mask=is_inside)


@triton.jit
def _gradients(
    inputs, scales, offsets, grads, inputs_grad, scale_sums, offset_sums, num_tokens, width,
    TERMS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    tokens = block * BLOCK_N + tl.arange(0, BLOCK_N)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channels < width
    is_inside = (tokens < num_tokens)[:, None] & is_channel[None, :]
    at = tokens[:, None].to(tl.int64) * 2 * width + channels[None, :]
    gate = tl.load(inputs + at, mask=is_inside, other=0.0).to(tl.float32)
    up = tl.load(inputs + at + width, mask=is_inside, other=0.0).to(tl.float32)
    place = tokens[:, None].to(tl.int64) * width + channels[None, :]
    # Zero beyond the last token and channel, so that these do not contribute to the sums.
    grad = tl.load(grads + place, mask=is_inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    gate_grad = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    for term in tl.static_range(TERMS):
        scale = tl.load(scales + term * width + channels, mask=is_channel, other=0.0).to(tl.float32)
        offset = tl.load(offsets + term * width + channels, mask=is_channel, other=0.0).to(tl.float32)
        z = scale[None, :] * gate + offset[None, :]
        sigmoid = tl.sigmoid(z)
        total += z * sigmoid
        z_grad = grad * up * sigmoid * (1 + z * (1 - sigmoid))
        gate_grad += scale[None, :] * z_grad
        sums_at = (block.to(tl.int64) * TERMS + term) * width + channels
        tl.store(scale_sums + sums_at, tl.sum(z_grad * gate, axis=0), mask=is_channel)
        tl.store(offset_sums + sums_at, tl.sum(z_grad, axis=0), mask=is_channel)
    tl.store(inputs_grad + at, gate_grad.to(inputs_grad.dtype.element_ty), mask=is_inside)
    tl.store(inputs_grad + at + width, (grad * total).to(inputs_grad.dtype.element_ty), mask=is_inside)


def activate(inputs_n2c: Tensor, scale_tc: Tensor, offset_tc: Tensor) -> Tensor:
    """Return the activated product, [n, c], of contiguous inputs with the shapes of `kernels.series_activation`."""
    num_tokens, (terms, width) = len(inputs_n2c), scale_tc.shape
    out_nc = inputs_n2c.new_empty(num_tokens, width)
    _activate[(triton.cdiv(num_tokens, _BLOCK_N), triton.cdiv(width, _BLOCK_C))](
        inputs_n2c, scale_tc, offset_tc, out_nc, num_tokens, width, **_options(terms)
    )
    return out_nc


def gradients(
    inputs_n2c: Tensor, scale_tc: Tensor, offset_tc: Tensor, grad_nc: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of inputs, [n, 2 c], scales and offsets, [t, c], in their dtypes; all contiguous."""
    num_tokens, (terms, width) = len(inputs_n2c), scale_tc.shape
    blocks = triton.cdiv(num_tokens, _BLOCK_N)
    inputs_grad = torch.empty_like(inputs_n2c)
    scale_sums, offset_sums = torch.empty(2, blocks, terms, width, device=inputs_n2c.device)
    _gradients[(blocks, triton.cdiv(width, _BLOCK_C))](
        inputs_n2c, scale_tc, offset_tc, grad_nc, inputs_grad, scale_sums, offset_sums, num_tokens, width,
        **_options(terms),
    )  # fmt: skip
    return inputs_grad, scale_sums.sum(dim=0).to(scale_tc.dtype), offset_sums.sum(dim=0).to(offset_tc.dtype)


def _options(terms: int) -> dict[str, int]:
    return {"TERMS": terms, "BLOCK_N": _BLOCK_N, "BLOCK_C": _BLOCK_C, "num_warps": _NUM_WARPS}
