"""Fused output layer and cross-entropy: token losses from hidden states, without materialising all logits.

Shapes: n tokens, h hidden channels, v rows of this rank's part of the vocabulary. With tensor parallelism, every rank
of `group` holds the same hidden states and consecutive rows of the weight; ranks exchange two small tensors (as in
Megatron-LM, Shoeybi et al. 2019, section 3).
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
    """The two functions of a fused kernel; labels outside the weight's rows belong to other ranks."""

    statistics: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
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
    weight_vh, labels_n, kernel = _own_part(weight_vh, labels_n, kernel, group, num_rows)
    if kernel == "reference":
        return _reference(hidden_nh, weight_vh, labels_n, group)
    loss: Tensor = _Fused.apply(hidden_nh, weight_vh, labels_n, group, _kernel(kernel))  # type: ignore[no-untyped-call]
    return loss


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
    weight_vh, labels_n, kernel = _own_part(weight_vh, labels_n, kernel, group, num_rows)
    if kernel == "triton":
        # Its logits are not rounded, so ties do not occur by chance.
        first_n, statistics = labels_n, _kernel(kernel).statistics(hidden_nh, weight_vh, labels_n)
    else:
        first_n = torch.zeros_like(labels_n)
        compute = _reference_statistics if kernel == "reference" else chunked.statistics
        statistics = compute(hidden_nh, weight_vh, labels_n, first_n)
    own_n = statistics[0].clone()
    maximum_n, sum_n, target_n = _reduce(*statistics, group)
    comes_later_n = ((own_n == maximum_n) & (first_n < labels_n)).float()
    if group is not None:
        all_reduce(comes_later_n, ReduceOp.MAX, group)
    return maximum_n + sum_n.log() - target_n, (target_n == maximum_n) & (comes_later_n == 0)


def _own_part(
    weight_vh: Tensor, labels_n: Tensor, kernel: LossKernel, group: ProcessGroup | None, num_rows: int | None
) -> tuple[Tensor, Tensor, LossKernel]:
    """Return this rank's rows without padding, the labels relative to them, and a kernel that supports them."""
    first_row = 0 if group is None else get_rank(group) * len(weight_vh)
    if num_rows is not None and first_row + len(weight_vh) > num_rows:
        weight_vh = weight_vh[: max(0, num_rows - first_row)]
        if not len(weight_vh):
            # Only padding: the chunked kernel supports zero rows, and communicates like the others.
            kernel = "chunked"
    return weight_vh, labels_n - first_row, kernel


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


def _reference(hidden_nh: Tensor, weight_vh: Tensor, labels_n: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the same losses in plain torch, holding the logits."""
    logits_nv = F.linear(hidden_nh, weight_vh).float()
    if group is None:
        return F.cross_entropy(logits_nv, labels_n, reduction="none")
    maximum_n = logits_nv.detach().amax(dim=1)
    all_reduce(maximum_n, ReduceOp.MAX, group)
    sum_n = torch.exp(logits_nv - maximum_n[:, None]).sum(dim=1)
    is_here_n = (labels_n >= 0) & (labels_n < len(weight_vh))
    target_n = logits_nv.gather(1, labels_n.clamp(0, len(weight_vh) - 1)[:, None])[:, 0].where(is_here_n, 0.0)
    sum_n, target_n = _Sum.apply(torch.stack([sum_n, target_n]), group)  # type: ignore[no-untyped-call]
    loss: Tensor = maximum_n + sum_n.log() - target_n
    return loss


def _reference_statistics(
    hidden_nh: Tensor, weight_vh: Tensor, labels_n: Tensor, first_n: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a kernel's statistics in plain torch, holding the logits; `first_n` as in the chunked kernel."""
    logits_nv = F.linear(hidden_nh, weight_vh).float()
    maximum_n, row_n = logits_nv.max(dim=1)
    first_n.copy_(row_n)
    sum_n = torch.exp(logits_nv - maximum_n[:, None]).sum(dim=1)
    is_here_n = (labels_n >= 0) & (labels_n < len(weight_vh))
    target_n = logits_nv.gather(1, labels_n.clamp(0, len(weight_vh) - 1)[:, None])[:, 0].where(is_here_n, 0.0)
    return maximum_n, sum_n, target_n


class _Fused(torch.autograd.Function):
    """Token losses whose backward pass recomputes the logits instead of saving them."""

    @staticmethod
    def forward(
        ctx: Any, hidden_nh: Tensor, weight_vh: Tensor, labels_n: Tensor, group: ProcessGroup | None, kernel: Kernel
    ) -> Tensor:
        maximum_n, sum_n, target_n = _reduce(*kernel.statistics(hidden_nh, weight_vh, labels_n), group)
        log_sum_n = maximum_n + sum_n.log()
        ctx.save_for_backward(hidden_nh, weight_vh, labels_n, log_sum_n)
        ctx.kernel = kernel
        return log_sum_n - target_n

    @staticmethod
    def backward(ctx: Any, grad_n: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden_grad, weight_grad = ctx.kernel.gradients(*ctx.saved_tensors, grad_n, *ctx.needs_input_grad[:2])
        return hidden_grad, weight_grad, None, None, None


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
