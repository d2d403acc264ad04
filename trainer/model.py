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
from megatron.core.pipeline_parallel.utils import is_vp_first_stage, is_vp_last_stage
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor

from data_scoring.config import padded_vocab_size
from kernels.linear_cross_entropy import LossKernel, linear_cross_entropy, score_labels
from kernels.series_activation import ActivationKernel
from kernels.swiglu import swiglu
from trainer.attention import RotaryAttention, RotaryTables, ScaledDotProductAttention
from trainer.config import ModelConfig, Recompute
from trainer.devices import check_layers, resolve_kernel
from trainer.initialisation import initialise, projection_init
from trainer.layer import Layer
from trainer.model_chunks import ModelChunks
from trainer.normalisation import RMSNorm
from trainer.pangu import AugmentedShortcut, SeriesActivation
from trainer.parallel_config import ParallelConfig


class SwiGLU(MegatronModule):
    """The activation of the gated feed-forward layer."""

    def forward(self, gate_and_up: Tensor) -> Tensor:
        """Return silu(gate) times up, [seq, batch, f], of gate and up, [seq, batch, 2 f]."""
        return swiglu(gate_and_up)


@dataclass(frozen=True)
class Kernels:
    """The kernels of token losses, in training and in evaluation mode (validation, scoring), and of the activation.

    recompute: what the backward pass computes again, as in `train.recompute`.
    """

    training: LossKernel = "chunked"
    scoring: LossKernel = "chunked"
    activation: ActivationKernel = "recompute"
    recompute: Recompute = "none"

    @classmethod
    def resolve(
        cls,
        kind: str,
        training: str = "auto",
        scoring: str = "auto",
        activation: str = "auto",
        recompute: Recompute = "none",
    ) -> "Kernels":
        """Return the kernels that a configuration's values select on devices of `kind`.

        Raises ValueError if one of them is requested by name and is not installed or does not run there.
        """
        return cls(
            resolve_kernel("train.loss_kernel", training, kind),
            resolve_kernel("score.loss_kernel", scoring, kind),
            resolve_kernel("train.activation_kernel", activation, kind),
            recompute,
        )


class Decoder(GPTModel):
    """Megatron's GPTModel with output layer and loss fused into one kernel, which need not materialise the logits."""

    def __init__(self, kernels: Kernels, num_tokens: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        # Rows of embedding and head from `num_tokens` on are padding and excluded from the loss.
        self.kernels, self.num_tokens = kernels, num_tokens

    def _postprocess(self, hidden_states: Tensor, labels: Tensor | None, **arguments: Any) -> Tensor:
        """Return token losses, [batch, seq] float32, nats; without labels, or on an earlier stage, as GPTModel does.

        hidden_states: [seq, batch, hidden], the same on every tensor-parallel rank, or with sequence parallelism the
        rank's part of the sequence; labels: [batch, seq].
        """
        if labels is None or not self.post_process:
            return cast(Tensor, super()._postprocess(hidden_states=hidden_states, labels=labels, **arguments))
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            # The kernel gives every rank the full gradient, of which each then takes its part.
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=group
            )
        loss_n = linear_cross_entropy(
            hidden_states.flatten(0, 1),
            self._head_weight(),
            labels.t().flatten(),
            self.kernels.training if self.training else self.kernels.scoring,
            group if group.size() > 1 else None,
            self.num_tokens,
        )
        return loss_n.view_as(labels.t()).t().contiguous()

    def judge(self, hidden_nh: Tensor, labels_n: Tensor) -> tuple[Tensor, Tensor]:
        """Return the labels' losses, [n] float32, nats, and whether each is the most probable token, [n] bool.

        For the last pipeline stage. hidden_nh: [n, hidden], the same on every tensor-parallel rank; labels_n: [n]
        int64.
        """
        group = self.pg_collection.tp
        tensor = group if group.size() > 1 else None
        return score_labels(hidden_nh, self._head_weight(), labels_n, self.kernels.scoring, tensor, self.num_tokens)

    def _head_weight(self) -> Tensor:
        tied = self.share_embeddings_and_output_weights
        return cast(Tensor, self.shared_embedding_or_output_weight() if tied else self.output_layer.weight)


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype, recompute: Recompute = "none"
) -> TransformerConfig:
    """Return Megatron's configuration of `model` under `parallel`, computing in `dtype`."""
    is_interleaved = parallel.virtual_pipeline > 1
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.channels,
        ffn_hidden_size=model.ffn_size,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=model.attention_bias != "none",
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_std,
        output_layer_init_method=projection_init(model),
        # Weights are initialised in full on the CPU and then split, so that they do not depend on the tensor-parallel
        # size.
        use_cpu_initialization=True,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if is_interleaved else None,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # The gradient is that of the mean over the batch's tokens, independent of layout and padding.
        calculate_per_token_loss=True,
        bias_activation_fusion=False,
        # Megatron takes a module for the whole gated activation only through this option.
        use_te_activation_func=model.layers == "torch" or model.activation_terms > 1,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        # A chunk is computed while the last one's output is sent, which must stay until then; and with two stages,
        # batched exchanges would mix up what the same two ranks send each other in both directions.
        overlap_p2p_comm=is_interleaved,
        batch_p2p_comm=not is_interleaved,
        deallocate_pipeline_outputs=not is_interleaved,
        # Megatron lets the host wait for the device after each exchange, because of an error of torch before 2.0.
        batch_p2p_sync=False,
        recompute_granularity=None if recompute == "none" else recompute,
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
        recompute_modules=["layernorm"] if model.layers == "torch" else ["mlp"],
    )


def build_model(
    model: ModelConfig,
    vocab_size: int,
    seq_length: int,
    parallel: ParallelConfig,
    device: torch.device,
    bf16: bool,
    kernels: Kernels,
) -> ModelChunks:
    """Return this rank's part of the model, freshly initialised, on `device`."""
    config = transformer_config(model, parallel, torch.bfloat16 if bf16 else torch.float32, kernels.recompute)
    chunks = (
        _build_chunk(number, model, vocab_size, seq_length, config, device, kernels)
        for number in range(parallel.virtual_pipeline)
    )
    return ModelChunks(Float16Module(config, chunk) if bf16 else chunk for chunk in chunks)


def _build_chunk(
    number: int,
    model: ModelConfig,
    vocab_size: int,
    seq_length: int,
    config: TransformerConfig,
    device: torch.device,
    kernels: Kernels,
) -> Decoder:
    """Return the chunk `number`, counted from 0, of this pipeline stage."""
    size = config.virtual_pipeline_model_parallel_size
    gpt = Decoder(
        kernels,
        vocab_size,
        config=config,
        transformer_layer_spec=_decoder_spec(number, model, config, kernels.activation),
        vocab_size=padded_vocab_size(vocab_size),
        max_sequence_length=seq_length,
        pre_process=parallel_state.is_pipeline_first_stage() and is_vp_first_stage(number, size),
        post_process=parallel_state.is_pipeline_last_stage() and is_vp_last_stage(number, size),
        vp_stage=number,
        position_embedding_type="rope",
        rotary_base=model.rotary_base,
        rope_scaling=model.rotary_scaling is not None,
        rope_scaling_factor=model.rotary_scaling or 1.0,
        share_embeddings_and_output_weights=model.tied_embeddings,
    )
    if model.layers == "torch":
        gpt.rotary_pos_emb = RotaryTables(gpt.rotary_pos_emb, config, device)
    initialise(gpt.decoder, model)
    gpt.to(device)
    return gpt


def with_bias(linear: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """Return Megatron's linear layer with a bias, which Megatron's configuration enables for all matrices or none."""

    class WithBias(linear):  # type: ignore[valid-type, misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "bias": True})

    return WithBias


def _decoder_spec(
    number: int, model: ModelConfig, config: TransformerConfig, kernel: ActivationKernel
) -> ModuleSpec | TransformerBlockSubmodules:
    """Return Megatron's spec of a chunk's layers, built of torch's modules or of Transformer Engine's."""
    check_layers(model.layers)
    if model.layers == "transformer_engine":
        layer = get_gpt_layer_with_transformer_engine_spec()
    else:
        layer = get_gpt_layer_local_spec(normalization="RMSNorm")
        layer.module = Layer
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        layer.submodules.self_attention.module = RotaryAttention
        layer.submodules.mlp.submodules.activation_func = SwiGLU
        layer.submodules.self_attention.submodules.core_attention = ModuleSpec(module=ScaledDotProductAttention)
    attention, mlp = layer.submodules.self_attention.submodules, layer.submodules.mlp.submodules
    if model.attention_bias == "all":
        attention.linear_proj = with_bias(attention.linear_proj)
    if model.ffn_bias:
        mlp.linear_fc1, mlp.linear_fc2 = with_bias(mlp.linear_fc1), with_bias(mlp.linear_fc2)
    if model.activation_terms > 1:
        layer.submodules.mlp.submodules.activation_func = ModuleSpec(
            module=SeriesActivation,
            params={"terms": model.activation_terms, "scales": model.activation_scales, "kernel": kernel},
        )
    if model.shortcut_reduction is not None:
        layer.submodules.self_attn_bda = ModuleSpec(
            module=AugmentedShortcut,
            params={"config": config, "reduction": model.shortcut_reduction, "reads": model.shortcut_input},
        )
    if model.layers == "transformer_engine":
        return layer
    # Otherwise Megatron chooses the final norm by which packages are installed.
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config, number), layer_norm=RMSNorm)
