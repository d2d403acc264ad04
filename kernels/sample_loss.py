"""Per-sample losses: sums of token losses.

Under tensor parallelism, `kernels.linear_cross_entropy` gives every rank the whole token losses.
"""

import torch
from torch import Tensor


def sum_per_sample(token_loss_bs: Tensor, num_tokens_b: Tensor) -> Tensor:
    """Return each sample's summed loss over its first `num_tokens` tokens, [batch] float32, in nats.

    token_loss_bs: [batch, seq_length], any float dtype; num_tokens_b: [batch] int64. Tokens beyond are padding and
    ignored, even if their loss is not finite.
    """
    position_s = torch.arange(token_loss_bs.shape[1], device=token_loss_bs.device)
    return token_loss_bs.float().masked_fill(position_s >= num_tokens_b[:, None], 0.0).sum(dim=1)
