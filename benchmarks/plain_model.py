"""The model in plain torch, sharing no code with the trainer: an oracle for tests and a baseline for benchmarks."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import ModelConfig
from trainer.pickles import check_pickles


class PlainLayer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, self.heads = config.hidden_size, config.num_attention_heads
        self.groups = config.num_query_groups or self.heads
        self.channels = hidden // self.heads
        self.attention_norm = nn.RMSNorm(hidden, eps=config.norm_epsilon)
        self.query = nn.Linear(hidden, hidden, bias=False)
        self.key = nn.Linear(hidden, self.groups * self.channels, bias=False)
        self.value = nn.Linear(hidden, self.groups * self.channels, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.ffn_norm = nn.RMSNorm(hidden, eps=config.norm_epsilon)
        self.gate = nn.Linear(hidden, config.ffn_size, bias=False)
        self.up = nn.Linear(hidden, config.ffn_size, bias=False)
        self.down = nn.Linear(config.ffn_size, hidden, bias=False)
        self.config = config
        if config.activation_terms > 1:
            width = config.ffn_size if config.activation_scales == "channel" else 1
            self.scale = nn.Parameter(torch.zeros(config.activation_terms, width))
            self.offset = nn.Parameter(torch.zeros(config.activation_terms, width))
        if config.shortcut_reduction is not None:
            self.shortcut_down = nn.Linear(hidden, hidden // config.shortcut_reduction, bias=False)
            self.shortcut_up = nn.Linear(hidden // config.shortcut_reduction, hidden, bias=False)

    def forward(self, x_bsh: Tensor, cos_sc: Tensor, sin_sc: Tensor) -> Tensor:
        batch, seq, hidden = x_bsh.shape
        normed = self.attention_norm(x_bsh)
        query, key, value = (
            linear(normed).view(batch, seq, -1, self.channels).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        query, key = rotate(query, cos_sc, sin_sc), rotate(key, cos_sc, sin_sc)
        repeats = self.heads // self.groups
        if repeats > 1:
            key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        shortcut = self.shortcut(x_bsh)
        x_bsh = x_bsh + self.out(attended.transpose(1, 2).reshape(batch, seq, hidden)) + shortcut
        normed = self.ffn_norm(x_bsh)
        return x_bsh + self.down(self.activate(self.gate(normed)) * self.up(normed))

    def activate(self, gate: Tensor) -> Tensor:
        if self.config.activation_terms == 1:
            return gate * torch.sigmoid(gate)
        z_t = gate[..., None, :] * self.scale + self.offset
        return (z_t * torch.sigmoid(z_t)).sum(dim=-2)

    def shortcut(self, x_bsh: Tensor) -> Tensor | float:
        if self.config.shortcut_reduction is None:
            return 0.0
        if self.config.shortcut_input == "normalised":
            x_bsh = x_bsh / (x_bsh.square().mean(dim=-1, keepdim=True) + self.config.norm_epsilon).sqrt()
        return self.shortcut_up(F.gelu(self.shortcut_down(x_bsh)))


def rotate(x_bnsc: Tensor, cos_sc: Tensor, sin_sc: Tensor) -> Tensor:
    first, second = x_bnsc.chunk(2, dim=-1)
    return x_bnsc * cos_sc + torch.cat([-second, first], dim=-1) * sin_sc


class PlainModel(nn.Module):
    """Tokens [batch, seq] to next-token losses [batch, seq], nats."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(PlainLayer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_epsilon)
        self.head = nn.Linear(config.hidden_size, vocab_size, bias=False)

    def forward(self, tokens_bs: Tensor, labels_bs: Tensor) -> Tensor:
        logits_bsv = self.logits(tokens_bs)
        return F.cross_entropy(logits_bsv.flatten(0, 1).float(), labels_bs.flatten(), reduction="none").view_as(
            labels_bs
        )

    def logits(self, tokens_bs: Tensor) -> Tensor:
        channels = self.config.hidden_size // self.config.num_attention_heads
        frequencies = self.config.rotary_base ** -(torch.arange(0, channels, 2).float() / channels)
        angles = torch.outer(torch.arange(tokens_bs.shape[1]).float(), frequencies).repeat(1, 2)
        x_bsh = self.embedding(tokens_bs)
        for layer in self.layers:
            x_bsh = layer(x_bsh, angles.cos(), angles.sin())
        logits_bsv: Tensor = self.head(self.norm(x_bsh))
        return logits_bsv


# Names in this model's layers to names in a Megatron checkpoint.
_ADDITIONS = {
    "scale": "mlp.activation_func.scale",
    "offset": "mlp.activation_func.offset",
    "shortcut_down.weight": "self_attn_bda.down",
    "shortcut_up.weight": "self_attn_bda.up",
}


def load_megatron_weights(model: PlainModel, tensors: dict[str, Tensor]) -> None:
    """Fill `model` from a Megatron checkpoint's global tensors, whose layers are stacked along the first axis."""
    config = model.config
    groups = config.num_query_groups or config.num_attention_heads
    channels = config.hidden_size // config.num_attention_heads
    per_group = config.num_attention_heads // groups
    state = {
        # The rest is padding.
        "embedding.weight": tensors["embedding.word_embeddings.weight"][: len(model.head.weight)],
        "norm.weight": tensors["decoder.final_layernorm.weight"],
        "head.weight": tensors["output_layer.weight"][: len(model.head.weight)],
    }
    for layer in range(config.num_layers):
        prefix = f"layers.{layer}"
        # A query group's rows: its query heads, its key, its value.
        qkv = tensors["decoder.layers.self_attention.linear_qkv.weight"][layer]
        qkv = qkv.view(groups, per_group + 2, channels, config.hidden_size)
        gate, up = tensors["decoder.layers.mlp.linear_fc1.weight"][layer].chunk(2)
        state |= {
            f"{prefix}.query.weight": qkv[:, :per_group].reshape(-1, config.hidden_size),
            f"{prefix}.key.weight": qkv[:, per_group].reshape(-1, config.hidden_size),
            f"{prefix}.value.weight": qkv[:, per_group + 1].reshape(-1, config.hidden_size),
            f"{prefix}.out.weight": tensors["decoder.layers.self_attention.linear_proj.weight"][layer],
            f"{prefix}.attention_norm.weight": tensors["decoder.layers.self_attention.linear_qkv.layer_norm_weight"][
                layer
            ],
            f"{prefix}.ffn_norm.weight": tensors["decoder.layers.mlp.linear_fc1.layer_norm_weight"][layer],
            f"{prefix}.gate.weight": gate,
            f"{prefix}.up.weight": up,
            f"{prefix}.down.weight": tensors["decoder.layers.mlp.linear_fc2.weight"][layer],
        }
        for name, part in _ADDITIONS.items():
            if f"decoder.layers.{part}" in tensors:
                state[f"{prefix}.{name}"] = tensors[f"decoder.layers.{part}"][layer]
    model.load_state_dict(state)


def read_checkpoint(checkpoint: Path) -> dict[str, Tensor]:
    """Return the global weights in a Megatron distributed checkpoint, read with torch only."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    check_pickles(checkpoint)
    reader = FileSystemReader(checkpoint)
    entries = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer.")
    }
    load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def stacked_weights(gpt: nn.Module, num_layers: int) -> dict[str, Tensor]:
    """Return the model's weights under the names, and in the layer-stacked shapes, of a distributed checkpoint."""
    weights = gpt.state_dict()
    parts = {
        "self_attention.linear_qkv.weight": "self_attention.linear_qkv.weight",
        "self_attention.linear_proj.weight": "self_attention.linear_proj.weight",
        "mlp.linear_fc1.weight": "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight": "mlp.linear_fc2.weight",
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
        **{part: part for part in _ADDITIONS.values()},
    }
    stacked = {
        f"decoder.layers.{name}": torch.stack(
            [weights[f"decoder.layers.{layer}.{part}"] for layer in range(num_layers)]
        )
        for name, part in parts.items()
        if f"decoder.layers.0.{part}" in weights
    }
    return {**weights, **stacked}
