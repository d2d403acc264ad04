"""The model: Megatron-Core's GPTModel, configured as a LLaMA-like decoder."""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.module import Float16Module, MegatronModule
from torch import Tensor

from data_scoring.config import LossKernel, padded_vocab_size
from kernels.linear_cross_entropy import linear_cross_entropy
from trainer.config import ModelConfig, ParallelConfig
from trainer.devices import check_layers, check_loss_kernel


class ScaledDotProductAttention(MegatronModule):
    """Causal core attention through torch's `scaled_dot_product_attention`, which never holds the scores at once."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **_: Any) -> Tensor:
        """Return the attention's output, [seq, batch, heads x channels], from [seq, batch, heads, channels] inputs.

        A single query is the last position, which sees all keys.
        """
        query_bhsd, key_bhsd, value_bhsd = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        out_bhsd = F.scaled_dot_product_attention(
            query_bhsd,
            key_bhsd,
            value_bhsd,
            is_causal=query.shape[0] > 1,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return out_bhsd.permute(2, 0, 1, 3).flatten(start_dim=2)


@dataclass(frozen=True)
class LossKernels:
    """How token losses are computed in training and, in evaluation mode, in validation and scoring."""

    training: LossKernel = "reference"
    scoring: LossKernel = "chunked"


class Decoder(GPTModel):
    """Megatron's GPTModel, whose output layer and loss are one kernel: where labels are given, logits need not be."""

    def __init__(self, loss_kernels: LossKernels, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.loss_kernels = loss_kernels

    def _postprocess(self, hidden_states: Tensor, labels: Tensor | None, **arguments: Any) -> Tensor:
        """Return token losses, [batch, seq] float32, nats; without labels, or on an earlier stage, what GPTModel does.

        hidden_states: [seq, batch, hidden], whole on every tensor-parallel rank; labels: [batch, seq].
        """
        if labels is None or not self.post_process:
            return cast(Tensor, super()._postprocess(hidden_states=hidden_states, labels=labels, **arguments))
        group = self.pg_collection.tp
        loss_n = linear_cross_entropy(
            hidden_states.flatten(0, 1),
            self.output_layer.weight,
            labels.t().flatten(),
            self.loss_kernels.training if self.training else self.loss_kernels.scoring,
            group if group.size() > 1 else None,
        )
        return loss_n.view_as(labels.t()).t().contiguous()


def transformer_config(model: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
    """Return Megatron's configuration of `model` under `parallel`, computing in `dtype`."""
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        ffn_hidden_size=model.ffn_size,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_std,
        # Weights are drawn on the CPU, whole, and then cut, so that they do not depend on the tensor-parallel size.
        use_cpu_initialization=True,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # The gradient is that of the mean over the batch's tokens, whatever the layout and however samples are padded.
        calculate_per_token_loss=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        deallocate_pipeline_outputs=True,
    )


def build_model(
    model: ModelConfig,
    vocab_size: int,
    seq_length: int,
    parallel: ParallelConfig,
    device: torch.device,
    bf16: bool,
    loss_kernels: LossKernels,
) -> MegatronModule:
    """Return this rank's part of the model, freshly initialised, on `device`."""
    check_loss_kernel("train.loss_kernel", loss_kernels.training, device.type)
    check_loss_kernel("score.loss_kernel", loss_kernels.scoring, device.type)
    config = transformer_config(model, parallel, torch.bfloat16 if bf16 else torch.float32)
    gpt = Decoder(
        loss_kernels,
        config=config,
        transformer_layer_spec=_layer_spec(model.layers),
        vocab_size=padded_vocab_size(vocab_size),
        max_sequence_length=seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
        rotary_base=model.rotary_base,
        share_embeddings_and_output_weights=False,
    ).to(device)
    return Float16Module(config, gpt) if bf16 else gpt


def _layer_spec(layers: str) -> ModuleSpec:
    """Return Megatron's description of a layer, built of torch's modules or of Transformer Engine's."""
    check_layers(layers)
    if layers == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec()
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = ModuleSpec(module=ScaledDotProductAttention)
    return spec
