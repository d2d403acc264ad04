"""The layer of `model.layers: torch`: Megatron's modules, with norms and activations that can be computed again."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Layer(TransformerLayer):
    """Megatron's layer without what this model has no use for, and with its own selective recomputation.

    Megatron's needs Transformer Engine for norms, and computes a feed-forward layer again with its products.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        inference_context: Any = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Return the residual stream, [seq, batch, hidden], after attention and feed-forward layer; and no context."""
        attend = partial(
            self.self_attention,
            attention_mask=attention_mask,
            inference_context=inference_context,
            rotary_pos_emb=rotary_pos_emb,
        )
        attended = self._chain(self.input_layernorm, attend, hidden_states)
        stream = self._add(self.self_attn_bda, attended, hidden_states)
        return self._add(self.mlp_bda, self._chain(self.pre_mlp_layernorm, self._feed_forward, stream), stream), None

    def _feed_forward(self, hidden_states: Tensor) -> Any:
        inputs, bias = self.mlp.linear_fc1(hidden_states)
        if bias is not None:
            inputs = inputs + bias
        return self._chain(self.mlp.activation_func, self.mlp.linear_fc2, inputs)

    def _chain(self, function: Callable[[Tensor], Tensor], consumer: Callable[[Tensor], Any], inputs: Tensor) -> Any:
        """Return consumer(function(inputs))."""
        if self.training and self.config.recompute_granularity == "selective":
            return apply_recomputed(function, consumer, inputs)
        return consumer(function(inputs))

    def _add(self, module: Any, output_and_bias: Any, stream: Tensor) -> Tensor:
        """Return the sum of a module's output, its bias and the residual stream."""
        add = module(self.training, self.config.bias_dropout_fusion)
        return cast(Tensor, add(output_and_bias, stream, self.hidden_dropout))


def apply_recomputed(function: Callable[[Tensor], Tensor], consumer: Callable[[Tensor], Any], inputs: Tensor) -> Any:
    """Return consumer(function(inputs)), which computes function(inputs) again where its backward pass needs it."""
    output = function(inputs)
    storage, shape = output.untyped_storage()._cdata, output.shape

    def keep(tensor: Tensor) -> Tensor | None:
        return None if tensor.untyped_storage()._cdata == storage and tensor.shape == shape else tensor

    def restore(kept: Tensor | None) -> Tensor:
        if kept is not None:
            return kept
        with torch.no_grad():
            return function(inputs)

    with saved_tensors_hooks(keep, restore):
        return consumer(output)
