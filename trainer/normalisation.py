"""RMSNorm, by torch's fused kernel where there is one."""

from typing import cast

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from kernels.rms_norm import rms_norm
from trainer.devices import has_fused_norm


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm, marked for sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps)
        # Tells Megatron to sum the gradient over tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the normalised inputs, [..., hidden]."""
        return normalise(inputs, self.weight, cast(float, self.eps))


def normalise(inputs: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """Return RMSNorm of the inputs, [..., hidden], by torch's fused kernel where there is one."""
    if has_fused_norm(inputs.device.type):
        return F.rms_norm(inputs, inputs.shape[-1:], weight, epsilon)
    return rms_norm(inputs, weight, epsilon)
