"""Token losses to per-sample losses, padded and packed."""

from itertools import pairwise

import torch
from torch import Tensor


def sum_per_sample(token_loss_bs: Tensor, num_tokens_b: Tensor) -> Tensor:
    """Return each sample's summed loss over its first `num_tokens` tokens, [batch] float32, in nats.

    token_loss_bs: [batch, seq_length], any float dtype; num_tokens_b: [batch] int64. Tokens beyond are padding and
    count nothing, not even where their loss is not finite.
    """
    position_s = torch.arange(token_loss_bs.shape[1], device=token_loss_bs.device)
    return token_loss_bs.float().masked_fill(position_s >= num_tokens_b[:, None], 0.0).sum(dim=1)


def sum_per_packed_sample(token_loss_n: Tensor, starts_b1: Tensor) -> Tensor:
    """Return each sample's summed loss, [batch] float32, in nats, of samples packed one after another.

    token_loss_n: [tokens], any float dtype; starts_b1: [batch + 1] int64, where each sample starts, then the number of
    tokens. A sample without tokens has 0. Summed in float64, sample by sample in a fixed order.
    """
    return torch.segment_reduce(token_loss_n.double(), "sum", offsets=starts_b1, initial=0.0).float()


def sum_per_packed_sample_reference(token_loss_n: Tensor, starts_b1: Tensor) -> Tensor:
    """Return the same in plain torch, a sample at a time."""
    starts = starts_b1.tolist()
    sums = [token_loss_n[start:end].double().sum() for start, end in pairwise(starts)]
    return torch.stack(sums).float()
