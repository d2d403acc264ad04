"""Linear cross-entropy in Triton: logits stay in registers, one tile at a time.

After Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models". Each program of the forward pass takes
a block of tokens and a range of the vocabulary, so that even few tokens occupy the whole device; a second step combines
their results in a fixed order. The backward pass writes chunks of the logits' gradients, from which torch's matrix
products compute those of the inputs. Sized for an H100's shared memory and registers; run so far only in Triton's
interpreter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.linear_cross_entropy_chunked import accumulate_gradients

_BLOCK_N = 128
_BLOCK_V = 256
_NUM_WARPS = 8
_NUM_STAGES = 3
# Two programs per multiprocessor of an H100.
_PROGRAMS = 264
# Logit gradients held at a time: 64 MiB in bfloat16, large enough for the matrix products to occupy the device.
_CHUNK = (4096, 8192)


@triton.jit
def _logits_tile(
    hidden, weight, tokens, rows, num_tokens, num_rows, width, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr
):
    """Return the logits of a tile, [tokens, rows] float32; -inf for rows beyond the last."""
    channels = tl.arange(0, BLOCK_H)
    hidden_at = hidden + tokens[:, None].to(tl.int64) * width + channels[None, :]
    weight_at = weight + rows[None, :].to(tl.int64) * width + channels[:, None]
    logits = tl.zeros((tokens.shape[0], rows.shape[0]), dtype=tl.float32)
    for start in range(0, width, BLOCK_H):
        is_inside = start + channels < width
        a = tl.load(hidden_at + start, mask=(tokens < num_tokens)[:, None] & is_inside[None, :], other=0.0)
        b = tl.load(weight_at + start, mask=is_inside[:, None] & (rows < num_rows)[None, :], other=0.0)
        logits = tl.dot(a, b, logits, input_precision=PRECISION)
    return tl.where((rows < num_rows)[None, :], logits, float("-inf"))


@triton.jit
def _statistics(
    hidden, weight, labels, maxima, sums, targets, num_tokens, num_rows, width, tiles_a_program,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_row = tl.program_id(1) * tiles_a_program * BLOCK_V
    is_token = tokens < num_tokens
    label = tl.load(labels + tokens, mask=is_token, other=-1)
    maximum = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    target = tl.zeros((BLOCK_N,), dtype=tl.float32)
    last_row = tl.minimum(first_row + tiles_a_program * BLOCK_V, num_rows)
    for start in range(first_row, last_row, BLOCK_V):
        rows = start + tl.arange(0, BLOCK_V)
        logits = _logits_tile(hidden, weight, tokens, rows, num_tokens, num_rows, width, BLOCK_H, PRECISION)
        target += tl.sum(tl.where(rows[None, :] == label[:, None], logits, 0.0), axis=1)
        higher = tl.maximum(maximum, tl.max(logits, axis=1))
        total = total * tl.exp(maximum - higher) + tl.sum(tl.exp(logits - higher[:, None]), axis=1)
        maximum = higher
    place = tl.program_id(1).to(tl.int64) * num_tokens + tokens
    tl.store(maxima + place, maximum, mask=is_token)
    tl.store(sums + place, total, mask=is_token)
    tl.store(targets + place, target, mask=is_token)


@triton.jit
def _logit_gradients(
    hidden, weight, labels, log_sums, grads, out, num_tokens, num_rows, width,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    is_token = tokens < num_tokens
    label = tl.load(labels + tokens, mask=is_token, other=-1)
    log_sum = tl.load(log_sums + tokens, mask=is_token, other=0.0)
    grad = tl.load(grads + tokens, mask=is_token, other=0.0)
    logits = _logits_tile(hidden, weight, tokens, rows, num_tokens, num_rows, width, BLOCK_H, PRECISION)
    is_label = (rows[None, :] == label[:, None]).to(tl.float32)
    values = (tl.exp(logits - log_sum[:, None]) - is_label) * grad[:, None]
    place = tokens[:, None].to(tl.int64) * num_rows + rows[None, :]
    tl.store(out + place, values.to(out.dtype.element_ty), mask=is_token[:, None] & (rows < num_rows)[None, :])


def statistics(hidden_nh: Tensor, weight_vh: Tensor, labels_n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each token's greatest logit, sum of exponentials relative to it and label's logit, [n] float32 each.

    Takes the arguments of `kernels.linear_cross_entropy_chunked.statistics`.
    """
    hidden_nh, weight_vh, labels_n = hidden_nh.contiguous(), weight_vh.contiguous(), labels_n.contiguous()
    num_tokens, num_rows = len(hidden_nh), len(weight_vh)
    blocks, tiles = triton.cdiv(num_tokens, _BLOCK_N), triton.cdiv(num_rows, _BLOCK_V)
    tiles_a_program = triton.cdiv(tiles, min(tiles, triton.cdiv(_PROGRAMS, blocks)))
    splits = triton.cdiv(tiles, tiles_a_program)
    maxima_sn, sums_sn, targets_sn = torch.empty(3, splits, num_tokens, device=hidden_nh.device)
    _statistics[(blocks, splits)](
        hidden_nh, weight_vh, labels_n, maxima_sn, sums_sn, targets_sn,
        num_tokens, num_rows, hidden_nh.shape[1], tiles_a_program, **_options(hidden_nh.dtype),
    )  # fmt: skip
    maximum_n = maxima_sn.amax(dim=0)
    sum_n = (sums_sn * torch.exp(maxima_sn - maximum_n)).sum(dim=0)
    return maximum_n, sum_n, targets_sn.sum(dim=0)


def gradients(
    hidden_nh: Tensor,
    weight_vh: Tensor,
    labels_n: Tensor,
    log_sum_n: Tensor,
    grad_n: Tensor,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients as `kernels.linear_cross_entropy_chunked.gradients` does."""
    return accumulate_gradients(
        _write_logit_gradients,
        _CHUNK,
        hidden_nh.contiguous(),
        weight_vh.contiguous(),
        labels_n,
        log_sum_n,
        grad_n.contiguous(),
        needs_hidden,
        needs_weight,
    )


def _write_logit_gradients(
    hidden_nh: Tensor, weight_vh: Tensor, labels_n: Tensor, log_sum_n: Tensor, grad_n: Tensor, out_nv: Tensor
) -> None:
    num_tokens, num_rows = out_nv.shape
    _logit_gradients[(triton.cdiv(num_tokens, _BLOCK_N), triton.cdiv(num_rows, _BLOCK_V))](
        hidden_nh, weight_vh, labels_n, log_sum_n, grad_n, out_nv,
        num_tokens, num_rows, hidden_nh.shape[1], **_options(hidden_nh.dtype),
    )  # fmt: skip


def _options(dtype: torch.dtype) -> dict[str, int | str]:
    """Return tile sizes whose three stages fit into shared memory, and full float32 precision instead of TF32."""
    block_h = 32 if dtype == torch.float32 else 64
    return {
        "BLOCK_N": _BLOCK_N, "BLOCK_V": _BLOCK_V, "BLOCK_H": block_h, "PRECISION": "ieee",
        "num_warps": _NUM_WARPS, "num_stages": _NUM_STAGES,
    }  # fmt: skip
