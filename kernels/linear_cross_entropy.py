"""Fused output layer and cross-entropy: token losses from hidden states, without materialising all logits.

Shapes: n tokens, h hidden channels, v rows of this rank's part of the vocabulary. With tensor parallelism, every rank
of `group` holds the same hidden states and consecutive rows of the weight; ranks exchange two small tensors (as in
Megatron-LM, Shoeybi et al. 2019, "Model Parallel Transformers").
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce, get_rank

from kernels import linear_cross_entropy_chunked as chunked

# reference holds all logits; chunked runs on any device; triton needs the triton package and a supported GPU.
LossKernel = Literal["reference", "chunked", "triton"]


class Kernel(NamedTuple):
    """The two functions of a fused kernel.

    Both take hidden states, weight, labels, which belong to other ranks if outside the weight's rows, and the number of
    rows that are not padding.
    """

    statistics: Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]
    gradients: Callable[..., tuple[Tensor | None, Tensor | None]]


def linear_cross_entropy(
    hidden_nh: Tensor,
    weight_vh: Tensor,
    labels_n: Tensor,
    kernel: LossKernel,
    group: ProcessGroup | None = None,
    num_rows: int | None = None,
) -> Tensor:
    """Return each token's negative log-likelihood, [n] float32, nats, differentiable.

    hidden_nh: [n, h], float32 or bfloat16; weight_vh: [v, h], of the same dtype; labels_n: [n] int64, rows of the whole
    vocabulary, not checked; num_rows: the rows of the whole vocabulary without padding; None: all. With a `group`, the
    loss takes two all-reduces ([n] and [2, n]), and the gradient of `hidden_nh`, which is summed over the group, one
    more of its size.
    """
    if group is not None:
        hidden_nh = _SumGradients.apply(hidden_nh, group)  # type: ignore[no-untyped-call]
    labels_n, own_rows = _own_part(weight_vh, labels_n, group, num_rows)
    if kernel == "reference":
        return _reference(hidden_nh, weight_vh, labels_n, own_rows, group)
    arguments = (hidden_nh, weight_vh, labels_n, own_rows, group, _kernel(kernel))
    loss: Tensor = _Fused.apply(*arguments)  # type: ignore[no-untyped-call]
    return loss


def chunk_bytes(kernel: str, is_accelerator: bool, element_bytes: int, num_tokens: int, num_rows: int) -> int:
    """Return the most bytes of logits and their gradients that chunked or triton holds, 0 for the reference.

    element_bytes: the bytes of an element of hidden states and weight; num_tokens, num_rows: the shape of the logits.
    """
    if kernel == "reference":
        return 0
    tokens, rows = _chunk(kernel, is_accelerator)
    # The gradients, which have the dtype of the inputs; without Triton, logits, and those in single precision.
    copies = [element_bytes] if kernel == "triton" else [element_bytes, element_bytes, *[4] * (element_bytes != 4)]
    return min(tokens, num_tokens) * min(rows, num_rows) * sum(copies)


def chunk_rows(kernel: str, is_accelerator: bool) -> int:
    """Return the most rows of the weight whose logits chunked or triton holds at once."""
    return _chunk(kernel, is_accelerator)[1]


def _chunk(kernel: str, is_accelerator: bool) -> tuple[int, int]:
    """Return the most tokens and the most rows of a kernel's chunk."""
    return chunked.TRITON_CHUNK if kernel == "triton" else chunked.chunk_of(is_accelerator)


@torch.no_grad()
def score_labels(
    hidden_nh: Tensor,
    weight_vh: Tensor,
    labels_n: Tensor,
    kernel: LossKernel,
    group: ProcessGroup | None = None,
    num_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the losses of `linear_cross_entropy`, and whether the label is the most probable token, [n] bool.

    Takes the same arguments; not differentiable. Of equally probable tokens, the first counts, as in argmax; ties are
    common in bfloat16, where logits are rounded.
    """
    labels_n, own_rows = _own_part(weight_vh, labels_n, group, num_rows)
    if kernel == "triton":
        # Its logits are not rounded, so ties do not occur by chance.
        first_n, statistics = labels_n, _kernel(kernel).statistics(hidden_nh, weight_vh, labels_n, own_rows)
    else:
        first_n = torch.zeros_like(labels_n)
        compute = _reference_statistics if kernel == "reference" else chunked.statistics
        statistics = compute(hidden_nh, weight_vh, labels_n, own_rows, first_n)
    own_n = statistics[0].clone()
    maximum_n, sum_n, target_n = _reduce(*statistics, group)
    comes_later_n = ((own_n == maximum_n) & (first_n < labels_n)).float()
    if group is not None:
        all_reduce(comes_later_n, ReduceOp.MAX, group)
    return maximum_n + sum_n.log() - target_n, (target_n == maximum_n) & (comes_later_n == 0)


def _own_part(
    weight_vh: Tensor, labels_n: Tensor, group: ProcessGroup | None, num_rows: int | None
) -> tuple[Tensor, int]:
    """Return the labels relative to this rank's rows, and how many of these rows are not padding; possibly none."""
    first_row = 0 if group is None else get_rank(group) * len(weight_vh)
    own_rows = len(weight_vh) if num_rows is None else min(max(0, num_rows - first_row), len(weight_vh))
    return labels_n - first_row, own_rows


def _reduce(
    maximum_n: Tensor, sum_n: Tensor, target_n: Tensor, group: ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the statistics of the whole vocabulary, reduced from those of each rank's rows."""
    if group is None:
        return maximum_n, sum_n, target_n
    own_n = maximum_n.clone()
    all_reduce(maximum_n, ReduceOp.MAX, group)
    sums_2n = torch.stack([sum_n * torch.exp(own_n - maximum_n), target_n])
    all_reduce(sums_2n, ReduceOp.SUM, group)
    return maximum_n, sums_2n[0], sums_2n[1]


def _kernel(name: str) -> Kernel:
    if name == "triton":
        # Triton is an optional dependency, imported only on request.
        from kernels import linear_cross_entropy_triton as triton

        return Kernel(triton.statistics, triton.gradients)
    return Kernel(chunked.statistics, chunked.gradients)


def _logits(hidden_nh: Tensor, weight_vh: Tensor, num_rows: int) -> Tensor:
    """Return all logits, [n, v] float32, -inf for padding."""
    bias_v = None
    if num_rows < len(weight_vh):
        # Slicing the padding off would leave the product with unaligned rows, which tensor cores do not support.
        bias_v = hidden_nh.new_zeros(len(weight_vh))
        bias_v[num_rows:] = -torch.inf
    return F.linear(hidden_nh, weight_vh, bias_v).float()


def _reference(
    hidden_nh: Tensor, weight_vh: Tensor, labels_n: Tensor, num_rows: int, group: ProcessGroup | None
) -> Tensor:
    """Return the same losses in plain torch, holding the logits."""
    logits_nv = _logits(hidden_nh, weight_vh, num_rows)
    if group is None:
        return F.cross_entropy(logits_nv, labels_n, reduction="none")
    maximum_n = logits_nv.detach().amax(dim=1)
    all_reduce(maximum_n, ReduceOp.MAX, group)
    sum_n = torch.exp(logits_nv - maximum_n[:, None]).sum(dim=1)
    target_n = chunked.label_logits(logits_nv, labels_n, num_rows)
    sum_n, target_n = _Sum.apply(torch.stack([sum_n, target_n]), group)  # type: ignore[no-untyped-call]
    loss: Tensor = maximum_n + sum_n.log() - target_n
    return loss


def _reference_statistics(
    hidden_nh: Tensor, weight_vh: Tensor, labels_n: Tensor, num_rows: int, first_n: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a kernel's statistics in plain torch, holding the logits; `first_n` as in the chunked kernel."""
    logits_nv = _logits(hidden_nh, weight_vh, num_rows)
    maximum_n, row_n = logits_nv.max(dim=1)
    first_n.copy_(row_n)
    sum_n = torch.exp(logits_nv - maximum_n[:, None]).sum(dim=1)
    target_n = chunked.label_logits(logits_nv, labels_n, num_rows)
    return maximum_n, sum_n, target_n


class _Fused(torch.autograd.Function):
    """Token losses whose backward pass recomputes the logits instead of saving them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_nh: Tensor,
        weight_vh: Tensor,
        labels_n: Tensor,
        num_rows: int,
        group: ProcessGroup | None,
        kernel: Kernel,
    ) -> Tensor:
        maximum_n, sum_n, target_n = _reduce(*kernel.statistics(hidden_nh, weight_vh, labels_n, num_rows), group)
        log_sum_n = maximum_n + sum_n.log()
        ctx.save_for_backward(hidden_nh, weight_vh, labels_n, log_sum_n)
        ctx.kernel, ctx.num_rows = kernel, num_rows
        return log_sum_n - target_n

    @staticmethod
    def backward(ctx: Any, grad_n: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        needed = ctx.needs_input_grad[:2]
        hidden_grad, weight_grad = ctx.kernel.gradients(*ctx.saved_tensors, grad_n, ctx.num_rows, *needed)
        return hidden_grad, weight_grad, None, None, None, None


class _Sum(torch.autograd.Function):
    """The sum over a group; all ranks compute the same loss from it, so the gradient passes through unchanged."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        tensor = tensor.clone()
        all_reduce(tensor, ReduceOp.SUM, group)
        return tensor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _SumGradients(torch.autograd.Function):
    """The identity, whose gradient is summed over the ranks' parts of the vocabulary."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        all_reduce(grad, ReduceOp.SUM, ctx.group)
        return grad, None
