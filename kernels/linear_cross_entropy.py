"""The output layer and the cross-entropy in one: token losses from hidden states, without holding all logits.

Shapes: n tokens, h hidden channels, v rows of this rank's part of the vocabulary. Under tensor parallelism every rank
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

# reference holds all logits; chunked runs on any device; triton needs the package of that name and a GPU it knows.
LossKernel = Literal["reference", "chunked", "triton"]


class Kernel(NamedTuple):
    """What a fused kernel consists of; labels outside of the weight's rows belong to other ranks."""

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

    hidden_nh: [n, h], float32 or bfloat16; weight_vh: [v, h], of the same dtype; labels_n: [n] int64, numbers of rows
    of the whole vocabulary, which is not checked; num_rows: how many of these count, those beyond being padding; None:
    all. With a `group` the loss takes two all-reduces ([n] and [2, n]) and the gradient of `hidden_nh`, which comes
    back summed over the group, one more of its size.
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
    """Return what `linear_cross_entropy` does, and whether the label is the most probable one, [n] bool.

    Takes the same, and gives no gradients. Of labels that are equally probable the first one is meant, as by argmax:
    in bfloat16 that is no rare case, for logits are rounded.
    """
    weight_vh, labels_n, kernel = _own_part(weight_vh, labels_n, kernel, group, num_rows)
    if kernel == "triton":
        # Its logits are not rounded, and no two are alike by chance.
        first_n, statistics = labels_n, _kernel(kernel).statistics(hidden_nh, weight_vh, labels_n)
    else:
        first_n = torch.zeros_like(labels_n)
        told = _reference_statistics if kernel == "reference" else chunked.statistics
        statistics = told(hidden_nh, weight_vh, labels_n, first_n)
    own_n = statistics[0].clone()
    maximum_n, sum_n, target_n = _add_up(*statistics, group)
    comes_later_n = ((own_n == maximum_n) & (first_n < labels_n)).float()
    if group is not None:
        all_reduce(comes_later_n, ReduceOp.MAX, group)
    return maximum_n + sum_n.log() - target_n, (target_n == maximum_n) & (comes_later_n == 0)


def _own_part(
    weight_vh: Tensor, labels_n: Tensor, kernel: LossKernel, group: ProcessGroup | None, num_rows: int | None
) -> tuple[Tensor, Tensor, LossKernel]:
    """Return this rank's rows that are no padding, the labels as numbers of these, and a kernel that can take them."""
    first_row = 0 if group is None else get_rank(group) * len(weight_vh)
    if num_rows is not None and first_row + len(weight_vh) > num_rows:
        weight_vh = weight_vh[: max(0, num_rows - first_row)]
        if not len(weight_vh):
            # Nothing but padding: what takes chunks takes none, and exchanges what the other kernels do.
            kernel = "chunked"
    return weight_vh, labels_n - first_row, kernel


def _add_up(
    maximum_n: Tensor, sum_n: Tensor, target_n: Tensor, group: ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a kernel's statistics, of this rank's rows, as those of the whole vocabulary."""
    if group is None:
        return maximum_n, sum_n, target_n
    own_n = maximum_n.clone()
    all_reduce(maximum_n, ReduceOp.MAX, group)
    sums_2n = torch.stack([sum_n * torch.exp(own_n - maximum_n), target_n])
    all_reduce(sums_2n, ReduceOp.SUM, group)
    return maximum_n, sums_2n[0], sums_2n[1]


def _kernel(name: str) -> Kernel:
    if name == "triton":
        # Triton is an extra: it is imported where it was asked for.
        from kernels import linear_cross_entropy_triton as triton

        return Kernel(triton.statistics, triton.gradients)
    return Kernel(chunked.statistics, chunked.gradients)


def _reference(hidden_nh: Tensor, weight_vh: Tensor, labels_n: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the same in plain torch, holding the logits."""
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
    """Return what a kernel's statistics are, in plain torch, holding the logits; `first_n` as for chunks."""
    logits_nv = F.linear(hidden_nh, weight_vh).float()
    maximum_n, row_n = logits_nv.max(dim=1)
    first_n.copy_(row_n)
    sum_n = torch.exp(logits_nv - maximum_n[:, None]).sum(dim=1)
    is_here_n = (labels_n >= 0) & (labels_n < len(weight_vh))
    target_n = logits_nv.gather(1, labels_n.clamp(0, len(weight_vh) - 1)[:, None])[:, 0].where(is_here_n, 0.0)
    return maximum_n, sum_n, target_n


class _Fused(torch.autograd.Function):
    """Token losses whose backward pass computes the logits again rather than keeping them."""

    @staticmethod
    def forward(
        ctx: Any, hidden_nh: Tensor, weight_vh: Tensor, labels_n: Tensor, group: ProcessGroup | None, kernel: Kernel
    ) -> Tensor:
        maximum_n, sum_n, target_n = _add_up(*kernel.statistics(hidden_nh, weight_vh, labels_n), group)
        log_sum_n = maximum_n + sum_n.log()
        ctx.save_for_backward(hidden_nh, weight_vh, labels_n, log_sum_n)
        ctx.kernel = kernel
        return log_sum_n - target_n

    @staticmethod
    def backward(ctx: Any, grad_n: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden_grad, weight_grad = ctx.kernel.gradients(*ctx.saved_tensors, grad_n, *ctx.needs_input_grad[:2])
        return hidden_grad, weight_grad, None, None, None


class _Sum(torch.autograd.Function):
    """The sum over a group, whose ranks all go on with the same loss: its gradient is theirs, as it is."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        tensor = tensor.clone()
        all_reduce(tensor, ReduceOp.SUM, group)
        return tensor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _SumGradients(torch.autograd.Function):
    """The tensor itself, whose gradient is the sum of what each rank's part of the vocabulary gives."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        all_reduce(grad, ReduceOp.SUM, ctx.group)
        return grad, None
