"""Shapes of the weights in a checkpoint, read without loading them, and their comparison with those of a model."""

from collections.abc import Mapping
from pathlib import Path

from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from data_scoring.config import padded_vocab_size
from trainer.checkpoint_folder import RECORD, find_damage, read_checkpoint_record
from trainer.config import ModelConfig
from trainer.pickles import check_pickles

Shape = tuple[int, ...]
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


def read_shapes(checkpoint: Path) -> dict[str, Shape]:
    """Return the shapes of the weights in `checkpoint` by their names, layers stacked along the first axis.

    Raises ValueError if the checkpoint is damaged or holds pickles that would run code.
    """
    damage = find_damage(checkpoint) if (checkpoint / RECORD).is_file() else f"it has no {RECORD}"
    if damage is not None:
        raise ValueError(
            f"{checkpoint}: not an intact checkpoint ({damage}); give a step-… folder, such as those in "
            "rounds/1/checkpoint of a run"
        )
    check_pickles(checkpoint)
    entries = FileSystemReader(checkpoint).read_metadata().state_dict_metadata.items()
    return {
        name: tuple(entry.size)
        for name, entry in entries
        if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer.")
    }


def shapes_of(model: ModelConfig, rows: int) -> dict[str, Shape]:
    """Return the shapes of the weights of `model` in a checkpoint, with `rows` rows in the embedding."""
    width, depth, ffn = model.hidden_size, model.num_layers, model.ffn_size
    queries, keys_and_values = model.channels * model.num_attention_heads, 2 * model.channels * model.num_groups
    layer: dict[str, Shape] = {
        "self_attention.linear_qkv.weight": (queries + keys_and_values, width),
        "self_attention.linear_qkv.layer_norm_weight": (width,),
        "self_attention.linear_proj.weight": (width, queries),
        "mlp.linear_fc1.weight": (2 * ffn, width),
        "mlp.linear_fc1.layer_norm_weight": (width,),
        "mlp.linear_fc2.weight": (width, ffn),
    }
    if model.attention_bias != "none":
        layer["self_attention.linear_qkv.bias"] = (queries + keys_and_values,)
    if model.attention_bias == "all":
        layer["self_attention.linear_proj.bias"] = (width,)
    if model.ffn_bias:
        layer |= {"mlp.linear_fc1.bias": (2 * ffn,), "mlp.linear_fc2.bias": (width,)}
    if model.activation_terms > 1:
        scales = (model.activation_terms, ffn if model.activation_scales == "channel" else 1)
        layer |= {"mlp.activation_func.scale": scales, "mlp.activation_func.offset": scales}
    if model.shortcut_reduction is not None:
        bottleneck = width // model.shortcut_reduction
        layer |= {"self_attn_bda.down": (bottleneck, width), "self_attn_bda.up": (width, bottleneck)}
    return {
        EMBEDDING: (rows, width),
        **{f"decoder.layers.{name}": (depth, *shape) for name, shape in layer.items()},
        "decoder.final_layernorm.weight": (width,),
        **({} if model.tied_embeddings else {HEAD: (rows, width)}),
    }


def check_start(checkpoint: Path, model: ModelConfig, vocab_size: int | None) -> None:
    """Raise ValueError if `model` cannot start from `checkpoint`: Megatron would silently skip mismatched weights.

    vocab_size: the tokenizer's; None if not known yet.
    """
    found = read_shapes(checkpoint)
    trained_with = read_checkpoint_record(checkpoint).get("vocab_size")
    if None not in (trained_with, vocab_size) and trained_with != vocab_size:
        raise ValueError(
            f"model.start_from: {checkpoint} was trained with a tokenizer of {trained_with} entries, but this one has "
            f"{vocab_size}; use that tokenizer, or cut the checkpoint to this one (`reprise tokenizer compact`)"
        )
    vocab_size = model.vocab_size or vocab_size
    rows = found.get(EMBEDDING, (0,))[0] if vocab_size is None else padded_vocab_size(vocab_size)
    difference = find_difference(found, shapes_of(model, rows))
    if difference is not None:
        name, own, others = difference
        raise ValueError(
            f"model.start_from: {checkpoint}: {name} is {own} there, but {others} in the model; configure the model "
            "as the checkpoint's, or start from another checkpoint"
        )


def find_difference(found: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> tuple[str, str, str] | None:
    """Return the first weight whose shapes differ, as its name and both shapes in words, or None."""
    for name in [*wanted, *sorted(found.keys() - wanted.keys())]:
        if found.get(name) != wanted.get(name):
            return name, _describe(found.get(name)), _describe(wanted.get(name))
    return None


def _describe(shape: Shape | None) -> str:
    return "missing" if shape is None else " x ".join(map(str, shape))
