"""Binary masks over neurons that keep an exact number, with a differentiable relaxation.

A mask keeps the k highest logits plus logistic noise: a Gumbel-sigmoid (Maddison et al. 2017, arXiv 1611.00712) of
exact size. Its gradient is that of the relaxation sigmoid((logits + noise − threshold) / temperature) with the
threshold at which it sums up to k (straight-through estimation, Bengio et al. 2013, arXiv 1308.3432).
"""

import torch
from torch import Tensor

from trainer.config import ModelConfig

# Kinds of masks: channels of the residual stream; per layer, feed-forward neurons, query groups, and the query heads of
# each query group.
KINDS = ("channels", "ffn", "groups", "heads")
_BISECTIONS = 60


class Masks:
    """The mask logits, [rows, n] float64 per kind, of which each row keeps `keep`.

    Rows: one for channels; the layers for feed-forward neurons and groups; the groups of all layers for heads.
    """

    def __init__(self, teacher: ModelConfig, student: ModelConfig) -> None:
        depth, groups = teacher.num_layers, teacher.num_groups
        shapes = {
            "channels": (1, teacher.hidden_size),
            "ffn": (depth, teacher.ffn_size),
            "groups": (depth, groups),
            "heads": (depth * groups, teacher.num_attention_heads // groups),
        }
        self.keep = {
            "channels": student.hidden_size,
            "ffn": student.ffn_size,
            "groups": student.num_groups,
            "heads": student.num_attention_heads // student.num_groups,
        }
        self.logits = {kind: torch.zeros(shapes[kind], dtype=torch.float64, requires_grad=True) for kind in KINDS}

    def draw(self, generator: torch.Generator, temperature: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return masks of zeros and ones, and their relaxations, which are differentiable in the logits."""
        hard, soft = {}, {}
        for kind, logits in self.logits.items():
            uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
            noisy = logits + uniform.logit()
            hard[kind] = keep_highest(noisy.detach(), self.keep[kind])
            soft[kind] = relax(noisy, self.keep[kind], temperature)
        return hard, soft


def keep_highest(values: Tensor, keep: int) -> Tensor:
    """Return ones for the `keep` highest values of each row (the first of equals) and zeros elsewhere, [rows, n]."""
    order = torch.sort(values, dim=1, descending=True, stable=True).indices
    return torch.zeros_like(values).scatter_(1, order[:, :keep], 1.0)


def relax(logits: Tensor, keep: int, temperature: float) -> Tensor:
    """Return sigmoid((logits - threshold) / temperature), with each row's threshold such that it sums to `keep`.

    logits: [rows, n] float64; differentiable, including the threshold's dependence on the logits.
    """
    if keep == logits.shape[1]:
        # No finite threshold gives a row of ones.
        return torch.ones_like(logits)
    with torch.no_grad():
        # At these thresholds all sigmoids of a row are below keep / n, or above it.
        rest = temperature * torch.tensor(logits.shape[1] / keep - 1).double().log()
        low, high = (bound(dim=1, keepdim=True) + rest for bound in (logits.amin, logits.amax))
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            is_too_low = torch.sigmoid((logits - middle) / temperature).sum(dim=1, keepdim=True) > keep
            low, high = middle.where(is_too_low, low), high.where(is_too_low, middle)
        threshold = (low + high) / 2
        sigmoid = torch.sigmoid((logits - threshold) / temperature)
        slope = (sigmoid * (1 - sigmoid)).clamp(min=1e-12)
    # Implicit differentiation: this term is zero, but its gradient is the threshold's.
    change = ((logits - logits.detach()) * slope).sum(dim=1, keepdim=True) / slope.sum(dim=1, keepdim=True)
    return torch.sigmoid((logits - threshold - change) / temperature)
