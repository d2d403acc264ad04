"""Weight initialisation: normal, with another standard deviation for projections onto the residual stream."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.utils import init_method_normal, scaled_init_method_normal
from torch import Tensor

from trainer.config import ModelConfig


def projection_init(model: ModelConfig) -> Callable[[Tensor], Tensor]:
    """Return the initialiser of the projections onto the residual stream, of attention and feed-forward."""
    method: Callable[[Tensor], Tensor] = (
        scaled_init_method_normal(model.init_std, model.num_layers)
        if model.init == "gpt2"
        else init_method_normal(model.init_std)
    )
    return method


def initialise(decoder: Any, model: ModelConfig) -> None:
    """Finish initialising this rank's layers of Megatron's `decoder`.

    With `init: internlm`, the projections of layer l, counted from 1, are scaled by 1/√(2 l), as in InternEvo. The
    shortcuts' first matrices are drawn last, so that shortcuts do not change the other weights of a seed.
    """
    with torch.no_grad():
        for layer in decoder.layers:
            if model.init == "internlm":
                for projection in (layer.self_attention.linear_proj, layer.mlp.linear_fc2):
                    projection.weight.mul_((2 * layer.layer_number) ** -0.5)
            if model.shortcut_reduction is not None:
                layer.self_attn_bda.down.normal_(std=model.init_std)
