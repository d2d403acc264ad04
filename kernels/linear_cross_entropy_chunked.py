"""Linear cross-entropy in chunks of tokens and vocabulary, in plain torch, for any device.

The sum over the vocabulary is accumulated chunk by chunk as (maximum, sum of exponentials relative to it) (online
softmax, Milakov and Gimelshein 2018), so that only one chunk of logits is held at a time.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# The most tokens and rows of a chunk. On a CPU, its logits, 8 MiB in float32, stay in the cache between the passes over
# them. On accelerators, whose caches are smaller, it occupies the whole device, and few kernels are launched.
_CPU_CHUNK = (1024, 2048)
_ACCELERATOR_CHUNK = (4096, 8192)
# With Triton, of the logits' gradients alone: 128 MiB in bfloat16, for adding up the products to take little time.
TRITON_CHUNK = (8192, 8192)
# Names of CPU instructions for products in bfloat16, as torch lists them, of x86 and of ARM.
_BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")
# Whole multiples of this many rows are multiplied, so that products are aligned for tensor cores.
_ALIGNMENT = 64

# Takes chunks of hidden states and weight, and the number of rows that are not padding; returns logits, [n, v] float32,
# -inf for padding, which the next call overwrites.
Logits = Callable[[Tensor, Tensor, int], Tensor]
# Takes chunks of hidden states, weight, labels, log-sums and loss gradients, the number of rows that are not padding,
# and the output for the logits' gradient, which is 0 for padding.
LogitGradients = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, Tensor], None]


def chunk_of(is_accelerator: bool) -> tuple[int, int]:
    """Return the most tokens and the most rows of a chunk of logits on an accelerator, or on a CPU."""
    return _ACCELERATOR_CHUNK if is_accelerator else _CPU_CHUNK


def statistics(
    hidden_nh: Tensor, weight_vh: Tensor, labels_n: Tensor, num_rows: int, first_n: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each token's greatest logit, sum of exponentials relative to it and label's logit, [n] float32 each.

    hidden_nh: [n, h]; weight_vh: [v, h]; labels_n: [n] int64, rows of the weight; the logit of a label outside them is
    0. num_rows: the rows of the weight before its padding, which does not count. first_n: [n] int64, overwritten with
    the first row that has the greatest logit; finding it takes extra time.
    """
    maximum_n = torch.full((len(hidden_nh),), -torch.inf, device=hidden_nh.device)
    sum_n, target_n = torch.zeros_like(maximum_n), torch.zeros_like(maximum_n)
    chunk = chunk_of(hidden_nh.device.type != "cpu")
    logits = _buffered(hidden_nh, weight_vh, chunk)
    for rows, valid in _row_slices(len(weight_vh), num_rows, chunk[1]):
        for tokens in _slices(len(hidden_nh), chunk[0]):
            logits_nv = logits(hidden_nh[tokens], weight_vh[rows], valid)
            target_n[tokens] += label_logits(logits_nv, labels_n[tokens] - rows.start, valid)
            if first_n is None:
                greatest = logits_nv.amax(dim=1)
            else:
                greatest, row_n = logits_nv.max(dim=1)
                first_n[tokens] = torch.where(greatest > maximum_n[tokens], row_n + rows.start, first_n[tokens])
            maximum = torch.maximum(maximum_n[tokens], greatest)
            sums = logits_nv.sub_(maximum[:, None]).exp_().sum(dim=1)
            sum_n[tokens] = sum_n[tokens] * torch.exp(maximum_n[tokens] - maximum) + sums
            maximum_n[tokens] = maximum
    return maximum_n, sum_n, target_n


def gradients(
    hidden_nh: Tensor,
    weight_vh: Tensor,
    labels_n: Tensor,
    log_sum_n: Tensor,
    grad_n: Tensor,
    num_rows: int,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of the hidden states, [n, h], and of the weight, [v, h], in their dtypes, if needed.

    log_sum_n: [n] float32, log-sum-exp over the whole vocabulary; grad_n: [n] float32, gradients of the token losses;
    the rest as for `statistics`. The gradient of padding is 0.
    """
    chunk = chunk_of(hidden_nh.device.type != "cpu")
    logits = _buffered(hidden_nh, weight_vh, chunk)

    def logit_gradients(
        hidden: Tensor, weight: Tensor, labels: Tensor, log_sum: Tensor, grad: Tensor, valid: int, out: Tensor
    ) -> None:
        logits_nv = logits(hidden, weight, valid).sub_(log_sum[:, None]).exp_().mul_(grad[:, None])
        index_n, is_here_n = _locate(labels, valid)
        logits_nv.scatter_add_(1, index_n, -grad.where(is_here_n, 0.0)[:, None])
        out.copy_(logits_nv)

    tensors = (hidden_nh, weight_vh, labels_n, log_sum_n, grad_n)
    return accumulate_gradients(logit_gradients, chunk, *tensors, num_rows, needs_hidden, needs_weight)


def accumulate_gradients(
    logit_gradients: LogitGradients,
    chunk: tuple[int, int],
    hidden_nh: Tensor,
    weight_vh: Tensor,
    labels_n: Tensor,
    log_sum_n: Tensor,
    grad_n: Tensor,
    num_rows: int,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the result of `gradients`, given a function for the logits' gradients.

    chunk: the most tokens and rows per chunk. Sums over chunks are accumulated in float32, in a fixed order.
    """
    hidden_grad = torch.zeros_like(hidden_nh, dtype=torch.float32) if needs_hidden else None
    weight_grad = torch.zeros_like(weight_vh) if needs_weight else None
    buffer = hidden_nh.new_empty(min(chunk[0], len(hidden_nh)) * min(chunk[1], len(weight_vh)))
    for rows, valid in _row_slices(len(weight_vh), num_rows, chunk[1]):
        weight = weight_vh[rows]
        rows_grad = None if weight_grad is None else weight_grad[rows].float()
        for tokens in _slices(len(hidden_nh), chunk[0]):
            hidden = hidden_nh[tokens]
            logit_grad = buffer[: len(hidden) * len(weight)].view(len(hidden), len(weight))
            labels = labels_n[tokens] - rows.start
            logit_gradients(hidden, weight, labels, log_sum_n[tokens], grad_n[tokens], valid, logit_grad)
            if hidden_grad is not None:
                _add_product(hidden_grad[tokens], logit_grad, weight)
            if rows_grad is not None:
                _add_product(rows_grad, logit_grad.t(), hidden)
        if weight_grad is not None and rows_grad is not None and weight_grad.dtype != rows_grad.dtype:
            weight_grad[rows] = rows_grad
    return None if hidden_grad is None else hidden_grad.to(hidden_nh.dtype), weight_grad


def label_logits(logits_nv: Tensor, labels_n: Tensor, num_rows: int) -> Tensor:
    """Return the labels' logits, [n] float32; 0 for labels outside the first `num_rows` rows."""
    index_n, is_here_n = _locate(labels_n, num_rows)
    return logits_nv.gather(1, index_n)[:, 0].where(is_here_n, 0.0)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add the matrix product to `total`, which is float32 whatever the dtype of the factors."""
    dtype = _product_dtype(a)
    if dtype == total.dtype:
        total.addmm_(a.to(dtype), b.to(dtype))
    else:
        total.add_(a @ b)


def _product_dtype(factor: Tensor) -> torch.dtype:
    """Return the dtype in which matrices such as `factor` are multiplied fastest.

    That is their own, but for bfloat16 on a CPU without instructions for it, where products in float32 take about a
    quarter of the time.
    """
    is_slow = factor.dtype == torch.bfloat16 and factor.device.type == "cpu" and not _multiplies_bfloat16()
    return torch.float32 if is_slow else factor.dtype


@functools.cache
def _multiplies_bfloat16() -> bool:
    """Return whether this CPU has instructions for products in bfloat16."""
    return any(torch.cpu.get_capabilities().get(name, False) for name in _BFLOAT16_INSTRUCTIONS)


def _buffered(hidden_nh: Tensor, weight_vh: Tensor, chunk: tuple[int, int]) -> Logits:
    """Return a function that computes the logits of chunks into a reused buffer."""
    product = hidden_nh.new_empty(min(chunk[0], len(hidden_nh)) * min(chunk[1], len(weight_vh)))
    # Half-precision logits are rounded and then summed in float32, as in the reference.
    single = product if product.dtype == torch.float32 else product.float()
    dtype = _product_dtype(hidden_nh)

    def logits(hidden: Tensor, weight: Tensor, valid: int) -> Tensor:
        shape = (len(hidden), len(weight))
        size = len(hidden) * len(weight)
        rounded_nv, logits_nv = product[:size].view(shape), single[:size].view(shape)
        if dtype == product.dtype:
            torch.mm(hidden, weight.t(), out=rounded_nv)
        else:
            rounded_nv.copy_(torch.mm(hidden.to(dtype), weight.to(dtype).t(), out=logits_nv))
        if single is not product:
            logits_nv.copy_(rounded_nv)
        if valid < len(weight):
            logits_nv[:, valid:] = -torch.inf
        return logits_nv

    return logits


def _locate(labels_n: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Return each label clamped to a valid column, [n, 1], and whether it was valid, [n]."""
    return labels_n.clamp(0, max(0, num_rows - 1))[:, None], (labels_n >= 0) & (labels_n < num_rows)


def _row_slices(total: int, num_rows: int, step: int) -> Iterator[tuple[slice, int]]:
    """Yield slices of the rows before the padding, and of padding what aligns the last; and how many are no padding."""
    end = min(total, -(-num_rows // _ALIGNMENT) * _ALIGNMENT)
    for start in range(0, num_rows, step):
        stop = min(start + step, end)
        yield slice(start, stop), min(stop, num_rows) - start


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))
