"""Linear cross-entropy in chunks of tokens and vocabulary, in plain torch, for any device.

The sum over the vocabulary is accumulated chunk by chunk as (maximum, sum of exponentials relative to it) (online
softmax, Milakov and Gimelshein 2018), so that only one chunk of logits is held at a time.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Logits held at a time, 8 MiB in float32: they stay in a CPU's cache between the passes over them.
_TOKENS = 1024
_ROWS = 2048

# Takes chunks of hidden states and weight; returns logits, [n, v] float32, which the next call overwrites.
Logits = Callable[[Tensor, Tensor], Tensor]
# Takes chunks of hidden states, weight, labels, log-sums and loss gradients, and the output for the logits' gradient.
LogitGradients = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]


def statistics(
    hidden_nh: Tensor, weight_vh: Tensor, labels_n: Tensor, first_n: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each token's greatest logit, sum of exponentials relative to it and label's logit, [n] float32 each.

    hidden_nh: [n, h]; weight_vh: [v, h]; labels_n: [n] int64, rows of the weight; the logit of a label outside them is
    0. first_n: [n] int64, overwritten with the first row that has the greatest logit; finding it takes extra time.
    """
    maximum_n = torch.full((len(hidden_nh),), -torch.inf, device=hidden_nh.device)
    sum_n, target_n = torch.zeros_like(maximum_n), torch.zeros_like(maximum_n)
    logits = _buffered(hidden_nh)
    for rows in _slices(len(weight_vh), _ROWS):
        for tokens in _slices(len(hidden_nh), _TOKENS):
            logits_nv = logits(hidden_nh[tokens], weight_vh[rows])
            target_n[tokens] += _target(logits_nv, labels_n[tokens] - rows.start)
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
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of the hidden states, [n, h], and of the weight, [v, h], in their dtypes, if needed.

    log_sum_n: [n] float32, log-sum-exp over the whole vocabulary; grad_n: [n] float32, gradients of the token losses;
    the rest as for `statistics`.
    """
    logits = _buffered(hidden_nh)

    def logit_gradients(
        hidden: Tensor, weight: Tensor, labels: Tensor, log_sum: Tensor, grad: Tensor, out: Tensor
    ) -> None:
        logits_nv = logits(hidden, weight).sub_(log_sum[:, None]).exp_().mul_(grad[:, None])
        index_n, is_here_n = _locate(labels, len(weight))
        logits_nv.scatter_add_(1, index_n, -grad.where(is_here_n, 0.0)[:, None])
        out.copy_(logits_nv)

    return accumulate_gradients(
        logit_gradients, (_TOKENS, _ROWS), hidden_nh, weight_vh, labels_n, log_sum_n, grad_n, needs_hidden, needs_weight
    )


def accumulate_gradients(
    logit_gradients: LogitGradients,
    chunk: tuple[int, int],
    hidden_nh: Tensor,
    weight_vh: Tensor,
    labels_n: Tensor,
    log_sum_n: Tensor,
    grad_n: Tensor,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the result of `gradients`, given a function for the logits' gradients.

    chunk: the most tokens and rows per chunk. Sums over chunks are accumulated in float32, in a fixed order.
    """
    hidden_grad = torch.zeros_like(hidden_nh, dtype=torch.float32) if needs_hidden else None
    weight_grad = torch.empty_like(weight_vh) if needs_weight else None
    buffer = hidden_nh.new_empty(min(chunk[0], len(hidden_nh)) * min(chunk[1], len(weight_vh)))
    for rows in _slices(len(weight_vh), chunk[1]):
        weight = weight_vh[rows]
        rows_grad = torch.zeros_like(weight, dtype=torch.float32)
        for tokens in _slices(len(hidden_nh), chunk[0]):
            hidden = hidden_nh[tokens]
            logit_grad = buffer[: len(hidden) * len(weight)].view(len(hidden), len(weight))
            logit_gradients(
                hidden, weight, labels_n[tokens] - rows.start, log_sum_n[tokens], grad_n[tokens], logit_grad
            )
            if hidden_grad is not None:
                _add_product(hidden_grad[tokens], logit_grad, weight)
            if weight_grad is not None:
                _add_product(rows_grad, logit_grad.t(), hidden)
        if weight_grad is not None:
            weight_grad[rows] = rows_grad
    return None if hidden_grad is None else hidden_grad.to(hidden_nh.dtype), weight_grad


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add the matrix product to `total`, which is float32 whatever the dtype of the factors."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)


def _buffered(hidden_nh: Tensor) -> Logits:
    """Return a function that computes logits into a reused buffer."""
    product = hidden_nh.new_empty(_TOKENS * _ROWS)
    # Half-precision logits are rounded and then summed in float32, as in the reference.
    single = product if product.dtype == torch.float32 else product.float()

    def logits(hidden: Tensor, weight: Tensor) -> Tensor:
        shape = (len(hidden), len(weight))
        size = len(hidden) * len(weight)
        logits_nv = torch.mm(hidden, weight.t(), out=product[:size].view(shape))
        return logits_nv if single is product else single[:size].view(shape).copy_(logits_nv)

    return logits


def _target(logits_nv: Tensor, labels_n: Tensor) -> Tensor:
    index_n, is_here_n = _locate(labels_n, logits_nv.shape[1])
    return logits_nv.gather(1, index_n)[:, 0].where(is_here_n, 0.0)


def _locate(labels_n: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Return each label clamped to a valid column, [n, 1], and whether it was valid, [n]."""
    return labels_n.clamp(0, num_rows - 1)[:, None], (labels_n >= 0) & (labels_n < num_rows)


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))
