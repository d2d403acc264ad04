"""A model with frozen weights that computes what its unmasked part would compute by itself."""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from trainer.config import ModelConfig
from trainer.model_chunks import ModelChunks
from trainer.pruning import Numbers

_NORMS = ("layernorm.weight", "layer_norm_weight")


class MaskedModel:
    """Masks on the activations of this rank's part of `model`, applied by hooks; only the constructor changes weights.

    Everything added to the residual stream is masked, so channels that the student lacks stay zero. Feed-forward
    neurons and heads are masked before their output projections. Units of the shortcut's bottleneck that are not in
    `bottleneck`, which is per layer, are zeroed permanently.
    """

    def __init__(
        self, model: ModelChunks, teacher: ModelConfig, student: ModelConfig, bottleneck: tuple[Numbers, ...]
    ) -> None:
        self._teacher, self._is_sequence_shared = teacher, model.config.sequence_parallel
        self._device = model.device
        self._masks: dict[str, Tensor] = {}
        model.requires_grad_(False)
        _normalise_over(student.hidden_size, model, teacher)
        for decoder in model.decoders:
            if decoder.pre_process:
                decoder.embedding.register_forward_hook(lambda _module, _inputs, output: self._on_channels(output))
        for layer in model.layers:
            number = layer.layer_number - 1
            self._hook(layer, number)
            if teacher.shortcut_reduction is not None:
                self._hook_shortcut(layer.self_attn_bda, bottleneck[number])

    def put_on(self, masks: Mapping[str, Tensor]) -> None:
        """Apply `masks` of zeros and ones to the next passes; kinds and shapes are those of `trainer.masks.Masks`."""
        self._masks = {kind: mask.float().to(self._device).requires_grad_() for kind, mask in masks.items()}

    def take_gradients(self) -> dict[str, Tensor]:
        """Return the masks' gradients, summed since `put_on`, float64 on the CPU, the same on all ranks."""
        gradients = [torch.zeros_like(mask) if mask.grad is None else mask.grad for mask in self._masks.values()]
        if not self._is_sequence_shared:
            # Tensor-parallel ranks have the same residual stream, and each has the full gradient of its mask.
            ranks = parallel_state.get_tensor_model_parallel_world_size()
            gradients = [
                gradient / ranks if kind == "channels" else gradient
                for kind, gradient in zip(self._masks, gradients, strict=True)
            ]
        # Layers, heads, neurons and samples are divided among ranks; the others' gradients are zero here.
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat)
        parts = torch.split(flat.cpu().double(), [gradient.numel() for gradient in gradients])
        return {kind: part.view_as(mask) for (kind, mask), part in zip(self._masks.items(), parts, strict=True)}

    def _hook(self, layer: Any, number: int) -> None:
        projection, fc2 = layer.self_attention.linear_proj, layer.mlp.linear_fc2
        projection.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * self._heads(number).to(inputs[0]),))
        fc2.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * self._neurons(number).to(inputs[0]),))
        for linear in (projection, fc2):
            # An output and a bias, which may be None.
            linear.register_forward_hook(lambda _module, _inputs, outputs: tuple(map(self._on_channels, outputs)))

    def _hook_shortcut(self, shortcut: Any, kept: Numbers) -> None:
        is_dropped = torch.ones(shortcut.up.shape[1], dtype=torch.bool)
        is_dropped[list(kept)] = False
        with torch.no_grad():
            shortcut.up[:, is_dropped.to(self._device)] = 0
        transform = shortcut.transform
        shortcut.transform = lambda stream: self._on_channels(transform(stream))

    def _on_channels(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor * self._masks["channels"][0].to(tensor.dtype)

    def _neurons(self, layer: int) -> Tensor:
        return _own(self._masks["ffn"][layer])

    def _heads(self, layer: int) -> Tensor:
        """Return the mask of this rank's heads' channels; a head is masked if its group is."""
        groups = self._teacher.num_groups
        of_group = self._masks["heads"][layer * groups : (layer + 1) * groups]
        heads = (self._masks["groups"][layer, :, None] * of_group).flatten()
        return _own(heads).repeat_interleave(self._teacher.channels)


def _own(mask: Tensor) -> Tensor:
    """Return this tensor-parallel rank's part of a mask."""
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    own: Tensor = mask.chunk(ranks)[parallel_state.get_tensor_model_parallel_rank()]
    return own


def _normalise_over(channels: int, model: ModelChunks, teacher: ModelConfig) -> None:
    """Rescale norms over the teacher's width to the student's width, all other channels being zero.

    With k of h channels, x / √(Σx²/k + ε) is √(k/h) x / √(Σx²/h + ε k/h).
    """
    ratio = channels / teacher.hidden_size
    model.config.layernorm_epsilon *= ratio
    module: Any
    for module in model.modules():
        if isinstance(getattr(module, "eps", None), float):
            module.eps *= ratio
    scaled = (*_NORMS, "self_attn_bda.down") if teacher.shortcut_input == "normalised" else _NORMS
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(scaled):
                parameter.mul_(ratio**0.5)
