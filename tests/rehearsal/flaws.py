"""Injected flaws that a rehearsal must detect, to show that it is not blind to them."""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.sample_loss import sum_per_sample


def mix_devices(token_loss_bs: Tensor, num_tokens_b: Tensor) -> Tensor:
    """Add numbers on the host to the losses, which are on the device."""
    return sum_per_sample(token_loss_bs + torch.ones(token_loss_bs.shape), num_tokens_b)


def read_a_number(token_loss_bs: Tensor, num_tokens_b: Tensor) -> Tensor:
    """Make the host wait for the number of tokens."""
    assert num_tokens_b.sum().item() > 0
    return sum_per_sample(token_loss_bs, num_tokens_b)


def reduce_on_host(token_loss_bs: Tensor, num_tokens_b: Tensor) -> Tensor:
    """Give numbers on the host to NCCL."""
    torch.distributed.all_reduce(torch.ones(1))
    return sum_per_sample(token_loss_bs, num_tokens_b)


def hold_the_losses(token_loss_bs: Tensor, num_tokens_b: Tensor) -> Tensor:
    """Keep a copy of every microbatch's losses."""
    _held.append(token_loss_bs.detach().clone())
    return sum_per_sample(token_loss_bs, num_tokens_b)


_held: list[Tensor] = []

# Each stands in the place of `sum_per_sample`.
FLAWS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    each.__name__: each for each in (mix_devices, read_a_number, reduce_on_host, hold_the_losses)
}
