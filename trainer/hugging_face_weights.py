"""Conversion of weights between Hugging Face's files and a checkpoint, one tensor of one layer at a time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_scoring.config import padded_vocab_size
from trainer.checkpoint_shapes import EMBEDDING, HEAD, Shape, find_difference, shapes_of
from trainer.config import ModelConfig
from trainer.hugging_face_config import has_zero_bias
from trainer.hugging_face_files import TensorFiles, write_tensors
from trainer.weights import LAYERS, Weights, write_weights

# Small enough to hold a whole file in memory while it is written; models below it get no index.
SHARD_BYTES = 500_000_000
_HEAD, _OUTPUT_BIAS = "lm_head.weight", ".self_attn.o_proj.bias"
# Our tensors, and the Hugging Face tensors that each is joined from.
_OUTER = {EMBEDDING: "model.embed_tokens.weight", "decoder.final_layernorm.weight": "model.norm.weight", HEAD: _HEAD}
_Q, _K, _V = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"
_IN_LAYER = {
    "self_attention.linear_qkv.layer_norm_weight": ("input_layernorm.weight",),
    "self_attention.linear_qkv.weight": (f"{_Q}.weight", f"{_K}.weight", f"{_V}.weight"),
    "self_attention.linear_qkv.bias": (f"{_Q}.bias", f"{_K}.bias", f"{_V}.bias"),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
    "self_attention.linear_proj.bias": ("self_attn.o_proj.bias",),
    "mlp.linear_fc1.layer_norm_weight": ("post_attention_layernorm.weight",),
    "mlp.linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc1.bias": ("mlp.gate_proj.bias", "mlp.up_proj.bias"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
    "mlp.linear_fc2.bias": ("mlp.down_proj.bias",),
    "mlp.activation_func.scale": ("mlp.act_fn.scale",),
    "mlp.activation_func.offset": ("mlp.act_fn.offset",),
    "self_attn_bda.down": ("shortcut.down.weight",),
    "self_attn_bda.up": ("shortcut.up.weight",),
}
# The name of our tensor, and the layer of a stacked one.
Piece = tuple[str, int | None]


def import_weights(files: TensorFiles, model: ModelConfig, target: Path, record: dict[str, Any]) -> None:
    """Write the tensors of `files`, which are those of `model`, as a checkpoint to `target`, keeping their dtypes.

    record: see `write_weights`. Rows that pad the vocabulary are zero. Raises ValueError, without writing anything, if
    a tensor is missing, does not match the model, or is not finite.
    """
    rows = model.vocab_size
    assert rows is not None
    expected = shapes_of(model, rows)
    pieces = _pieces(expected)
    whole = {name: shape for piece in pieces for name, shape in _shapes(piece, expected, model).items()}
    files.check(whole, lambda name: _is_superfluous(name, model))
    _check_superfluous(files, model)
    names: dict[str, list[str]] = {}
    for piece in pieces:
        names.setdefault(piece[0], []).extend(_names(piece))
    dtypes = {name: files.dtype(parts) for name, parts in names.items()}

    def produce(name: str, layer: int | None) -> Tensor:
        tensor = join(name, [files.read(part) for part in _names((name, layer))], model)
        if name not in (EMBEDDING, HEAD):
            return tensor
        padded = tensor.new_zeros(padded_vocab_size(rows), tensor.shape[1])
        padded[:rows] = tensor
        return padded

    tensors = {name: (shape, dtypes[name]) for name, shape in shapes_of(model, padded_vocab_size(rows)).items()}
    write_weights(target, tensors, produce, record)


def export_weights(
    weights: Weights,
    model: ModelConfig,
    family: str,
    rows: int,
    dtype: torch.dtype | None,
    folder: Path,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the `weights` of `model` to safetensors files of at most `shard_bytes` in `folder`.

    rows: number of rows of embedding and head to keep; the others are padding. dtype: None keeps dtypes. Raises
    ValueError if the weights do not match the model.
    """
    difference = find_difference(weights.shapes, shapes_of(model, padded_vocab_size(rows)))
    if difference is not None:
        name, own, others = difference
        raise ValueError(
            f"{weights.checkpoint}: {name} is {own}, but {others} according to the model's description; give the "
            "description of the checkpoint's model"
        )
    shapes = shapes_of(model, rows)
    pieces = _pieces(shapes)
    with_zeros = has_zero_bias(model, family)

    def produce(number: int) -> dict[str, Tensor]:
        name, layer = pieces[number]
        tensor = weights.read(name, layer)
        if name in (EMBEDDING, HEAD):
            tensor = tensor[:rows]
        tensor = tensor.to(dtype or tensor.dtype)
        # safetensors rejects tensors that share memory.
        parts = [part.clone(memory_format=torch.contiguous_format) for part in split(name, tensor, model)]
        named = dict(zip(_names((name, layer)), parts, strict=True))
        if with_zeros and name.endswith("linear_proj.weight"):
            named[f"model.layers.{layer}{_OUTPUT_BIAS}"] = tensor.new_zeros(model.hidden_size)
        return named

    sizes = [
        torch.Size(shapes[name] if layer is None else shapes[name][1:]).numel()
        * (dtype or weights.dtypes[name]).itemsize
        for name, layer in pieces
    ]
    write_tensors(folder, sizes, produce, shard_bytes)


def join(name: str, parts: Sequence[Tensor], model: ModelConfig) -> Tensor:
    """Return our tensor `name`, of one layer, joined from Hugging Face's `parts`.

    Queries, keys and values are interleaved by query group: its query heads, its key, its value.
    """
    if ".linear_qkv." in name and len(parts) == 3:
        groups = [part.reshape(model.num_groups, -1, *part.shape[1:]) for part in parts]
        return torch.cat(groups, dim=1).flatten(0, 1)
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def split(name: str, tensor: Tensor, model: ModelConfig) -> Sequence[Tensor]:
    """Return Hugging Face's parts of our tensor `name`, of one layer; the inverse of `join`."""
    count = len(_names((name, 0 if name.startswith(LAYERS) else None)))
    if count == 3:
        groups = tensor.reshape(model.num_groups, -1, *tensor.shape[1:])
        queries = model.channels * model.num_attention_heads // model.num_groups
        return [part.flatten(0, 1) for part in torch.split(groups, [queries, model.channels, model.channels], dim=1)]
    return tensor.chunk(count)


def _pieces(shapes: dict[str, Shape]) -> list[Piece]:
    """Return all tensors, stacked ones layer by layer, in the order in which a model uses them."""
    stacked = [name for name in shapes if name.startswith(LAYERS)]
    depth = shapes[stacked[0]][0]
    layers: list[Piece] = [(name, layer) for layer in range(depth) for name in stacked]
    outer: list[Piece] = [(name, None) for name in _OUTER if name in shapes]
    return [outer[0], *layers, *outer[1:]]


def _names(piece: Piece) -> list[str]:
    """Return the Hugging Face names of a piece's parts."""
    name, layer = piece
    if layer is None:
        return [_OUTER[name]]
    return [f"model.layers.{layer}.{part}" for part in _IN_LAYER[name.removeprefix(LAYERS)]]


def _shapes(piece: Piece, shapes: dict[str, Shape], model: ModelConfig) -> dict[str, Shape]:
    name, layer = piece
    ours = torch.empty(shapes[name] if layer is None else shapes[name][1:], device="meta")
    parts = split(name, ours, model)
    return {part: tuple(each.shape) for part, each in zip(_names(piece), parts, strict=True)}


def _is_superfluous(name: str, model: ModelConfig) -> bool:
    """Return whether a tensor is redundant: rotary frequencies, a tied head, a zero bias."""
    return (
        name.endswith(".rotary_emb.inv_freq")
        or (model.tied_embeddings and name == _HEAD)
        or (model.attention_bias == "qkv" and name.endswith(_OUTPUT_BIAS))
    )


def _check_superfluous(files: TensorFiles, model: ModelConfig) -> None:
    """Raise ValueError if a redundant tensor does not have the expected values."""
    embedding = _OUTER[EMBEDDING]
    if model.tied_embeddings and _HEAD in files.entries and not torch.equal(files.read(_HEAD), files.read(embedding)):
        raise ValueError(
            f"{files.entries[_HEAD].file}: {_HEAD} differs from {embedding}, but config.json sets "
            "tie_word_embeddings; set it to false there"
        )
    for name in files.entries:
        if model.attention_bias == "qkv" and name.endswith(_OUTPUT_BIAS) and files.read(name).any():
            raise ValueError(
                f"{files.entries[name].file}: {name} is not zero; leave attention_output_bias out of config.json"
            )
