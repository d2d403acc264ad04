"""Attention of `model.layers: torch`: rotary embedding from tables, a key-value cache, and torch's kernels."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from kernels.rotary import rotary_table, rotate


class ScaledDotProductAttention(MegatronModule):
    """Causal core attention with torch's `scaled_dot_product_attention`, which does not materialise the scores."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any) -> Tensor:
        """Return the attention's output, [seq, batch, heads x channels], for [seq, batch, heads, channels] inputs.

        attention_mask: as torch's function takes it, [batch or 1, 1, queries, keys]; None: causal, where a single query
        is the last position and attends to all keys.
        """
        query_bhsd, key_bhsd, value_bhsd = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        length, size = query.shape[0], query.shape[2] // key.shape[2]
        if size > 1 and length == 1:
            # The heads of a group, at one position, are as many queries of one head: no key has to be repeated.
            query_bhsd = query_bhsd.reshape(*key_bhsd.shape[:2], size, -1)
        elif size > 1 and attention_mask is not None:
            # On CUDA, torch's only kernel for both a mask and grouped queries materialises all scores.
            key_bhsd, value_bhsd = (tensor.repeat_interleave(size, dim=1) for tensor in (key_bhsd, value_bhsd))
        out_bhsd = F.scaled_dot_product_attention(
            query_bhsd,
            key_bhsd,
            value_bhsd,
            attn_mask=attention_mask,
            is_causal=attention_mask is None and length > 1,
            scale=self.softmax_scale,
            enable_gqa=query_bhsd.shape[1] != key_bhsd.shape[1],
        )
        if length == 1:
            return out_bhsd.flatten(start_dim=1)[None]
        return out_bhsd.permute(2, 0, 1, 3).flatten(start_dim=2)


class RotaryTables(torch.nn.Module):
    """Megatron's rotary embedding with the table of `kernels.rotary` in place of angles, computed once."""

    def __init__(self, embedding: RotaryEmbedding, config: TransformerConfig, device: torch.device) -> None:
        super().__init__()
        self._angles, self._dtype, self._device = embedding.get_freqs_non_repeated, config.params_dtype, device
        self._num_queries = config.num_attention_heads // cast(int, config.num_query_groups)
        self.get_rotary_seq_len = embedding.get_rotary_seq_len
        self._table: Tensor | None = None

    def forward(self, length: int, **_: Any) -> Tensor:
        """Return the table for positions 0 to `length` - 1, [length, 3, row]."""
        if self._table is None or len(self._table) < length:
            # What is made in inference mode could not be used in training.
            with torch.inference_mode(False):
                table = rotary_table(self._angles(length), self._num_queries, self._dtype)
                self._table = table.to(self._device)
        return self._table[:length]


class RotaryAttention(SelfAttention):
    """Megatron's self-attention that rotates queries and keys in one pass, and caches keys after their rotation."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        inference_context: StaticInferenceContext | None = None,
        rotary_pos_emb: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output, [seq, batch, hidden], and the projection's bias, which the caller adds.

        rotary_pos_emb: rows of `RotaryTables`, one per position of the input, or with a context, of the whole sequence.
        """
        assert rotary_pos_emb is not None
        qkv, _ = self.linear_qkv(hidden_states)
        channels, length = self.hidden_size_per_attention_head, len(qkv)
        if inference_context is not None:
            start = inference_context.sequence_len_offset
            rotary_pos_emb = rotary_pos_emb[start : start + length]
        qkv = qkv.unflatten(-1, (self.num_query_groups_per_partition, -1))
        query, key, value = rotate(qkv, rotary_pos_emb, channels)
        if inference_context is not None:
            key, value = self._cache(inference_context, key, value)
        attended = self.core_attention(query, key, value, attention_mask)
        return cast(tuple[Tensor, Tensor | None], self.linear_proj(attended))

    def _cache(self, context: StaticInferenceContext, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return all keys and values so far, [seq, batch, groups, channels], having added these to the cache."""
        length, batch, groups, channels = key.shape
        if self.layer_number not in context.key_value_memory_dict:
            # The positions of a head are contiguous, as attention reads them.
            shape = (batch, groups, context.max_sequence_length, channels)
            context.key_value_memory_dict[self.layer_number] = (key.new_empty(shape), key.new_empty(shape))
        end = context.sequence_len_offset + length
        found = []
        for memory, new in zip(context.key_value_memory_dict[self.layer_number], (key, value), strict=True):
            memory_sbgd = memory.permute(2, 0, 1, 3)
            memory_sbgd[context.sequence_len_offset : end] = new
            found.append(memory_sbgd[:end])
        return found[0], found[1]
