"""A Llama with PanGu-π's two additions (arXiv 2312.17276), for Hugging Face transformers 5.

Part of models exported by Reprise; load them with `AutoModelForCausalLM.from_pretrained(…, trust_remote_code=True)`.
Use it for inference or further training of exported models only: weights that transformers initialises differ from
those with which Reprise starts training. It adds to transformers' Llama, each enabled by a field of config.json,

- the series informed activation in the gated feed-forward layer, (Σ_i silu(a_i · gate + b_i)) · up, if
  `activation_terms` is more than 1; there is one pair of scale a and offset b per term and channel, or per term,
  depending on `activation_scales`;
- the augmented shortcut around attention, attention + stream + up(gelu(down(stream))), if `shortcut_reduction` is
  given; depending on `shortcut_input`, its input is scaled to a root mean square of 1, or left as it is.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer


class RepriseConfig(LlamaConfig):
    """Llama's configuration with the fields that Reprise adds."""

    model_type = "reprise"

    activation_terms: int = 1
    activation_scales: str = "channel"
    shortcut_reduction: int | None = None
    shortcut_input: str = "normalised"

    def validate_architecture(self) -> None:
        """Allow any number of heads; Llama rejects numbers that do not divide hidden_size."""


class SeriesActivation(nn.Module):
    """Sum of scaled and shifted silu: gate [..., f] to [..., f]."""

    def __init__(self, config: RepriseConfig) -> None:
        super().__init__()
        width = config.intermediate_size if config.activation_scales == "channel" else 1
        self.scale = nn.Parameter(torch.zeros(config.activation_terms, width))
        self.offset = nn.Parameter(torch.zeros(config.activation_terms, width))
        # Starts as plain silu, as in Reprise.
        with torch.no_grad():
            self.scale[0] = 1

    def forward(self, gate: Tensor) -> Tensor:
        """Return the sum over terms, of the shape of `gate`."""
        terms = [F.silu(gate * scale + offset) for scale, offset in zip(self.scale, self.offset, strict=True)]
        return torch.stack(terms).sum(dim=0)


class Shortcut(nn.Module):
    """The bottleneck parallel to attention: stream [batch, seq, hidden] to the same shape."""

    def __init__(self, config: RepriseConfig) -> None:
        super().__init__()
        bottleneck = config.hidden_size // config.shortcut_reduction
        self.down = nn.Linear(config.hidden_size, bottleneck, bias=False)
        self.up = nn.Linear(bottleneck, config.hidden_size, bias=False)
        self.is_normalised, self.epsilon = config.shortcut_input == "normalised", config.rms_norm_eps

    def forward(self, stream: Tensor) -> Tensor:
        """Return what is added to the stream."""
        if self.is_normalised:
            stream = F.rms_norm(stream, stream.shape[-1:], eps=self.epsilon)
        shortcut: Tensor = self.up(F.gelu(self.down(stream)))
        return shortcut


class RepriseDecoderLayer(LlamaDecoderLayer):
    """Llama's layer with the additions."""

    def __init__(self, config: RepriseConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if config.activation_terms > 1:
            self.mlp.act_fn = SeriesActivation(config)
        self.shortcut = None if config.shortcut_reduction is None else Shortcut(config)

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        """Return the stream after the layer; all other arguments are passed to attention."""
        stream = hidden_states
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(stream), **arguments)
        if self.shortcut is not None:
            attended = attended + self.shortcut(stream)
        stream = stream + attended
        output: Tensor = stream + self.mlp(self.post_attention_layernorm(stream))
        return output


class RepriseModel(LlamaModel):
    """Llama's decoder with `RepriseDecoderLayer`."""

    config_class = RepriseConfig
    _no_split_modules: ClassVar = ["RepriseDecoderLayer"]

    def __init__(self, config: RepriseConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(RepriseDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.post_init()


class RepriseForCausalLM(LlamaForCausalLM):
    """Llama's language model with `RepriseModel`."""

    config_class = RepriseConfig
    _no_split_modules: ClassVar = ["RepriseDecoderLayer"]

    def __init__(self, config: RepriseConfig) -> None:
        super().__init__(config)
        self.model = RepriseModel(config)
        self.post_init()
