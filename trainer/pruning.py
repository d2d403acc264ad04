"""Structured pruning: a smaller model that inherits layers, and neurons within them, from a larger one, its teacher."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from data_scoring.config import Config, padded_vocab_size
from kernels.series_activation import initial_offsets
from trainer.checkpoint_folder import read_checkpoint_record
from trainer.checkpoint_shapes import EMBEDDING, HEAD, find_difference, shapes_of
from trainer.config import ModelConfig
from trainer.vocabulary_rows import select_rows
from trainer.weights import LAYERS, Weights, write_weights

# The kind of each axis of a layer's tensors. `attended`: the channels of all query heads; `qkv`: those of every query
# group's query heads, key and value; `gate_and_up`: the feed-forward neurons, twice.
AXES: dict[str, tuple[str, ...]] = {
    "self_attention.linear_qkv.weight": ("qkv", "channels"),
    "self_attention.linear_qkv.bias": ("qkv",),
    "self_attention.linear_qkv.layer_norm_weight": ("channels",),
    "self_attention.linear_proj.weight": ("channels", "attended"),
    "self_attention.linear_proj.bias": ("channels",),
    "mlp.linear_fc1.weight": ("gate_and_up", "channels"),
    "mlp.linear_fc1.bias": ("gate_and_up",),
    "mlp.linear_fc1.layer_norm_weight": ("channels",),
    "mlp.linear_fc2.weight": ("channels", "ffn"),
    "mlp.linear_fc2.bias": ("channels",),
    "mlp.activation_func.scale": ("terms", "ffn"),
    "mlp.activation_func.offset": ("terms", "ffn"),
    "self_attn_bda.down": ("bottleneck", "channels"),
    "self_attn_bda.up": ("channels", "bottleneck"),
}
SCALE, OFFSET, DOWN, UP = list(AXES)[-4:]

Numbers = tuple[int, ...]


class PruningPlan(Config):
    """The units of a teacher to keep, as ascending indices; fields per layer are in the order of `layers`."""

    layers: Numbers = Field(description="Layers, counted from 0.")
    channels: Numbers = Field(description="Channels of the residual stream, the same in the whole model.")
    ffn: tuple[Numbers, ...] = Field(description="Per layer: neurons of the feed-forward layer.")
    groups: tuple[Numbers, ...] = Field(description="Per layer: query groups, each with its key and its value.")
    heads: tuple[Numbers, ...] = Field(
        description="Per layer: query heads, counted over all groups; the same number in each kept group."
    )
    bottleneck: tuple[Numbers, ...] = Field(
        description="Per layer: units of the augmented shortcut's bottleneck; none without a shortcut."
    )


def whole_layers(teacher: ModelConfig, layers: Sequence[int]) -> PruningPlan:
    """Return the plan that keeps the given layers of the teacher completely."""
    return PruningPlan(
        layers=tuple(layers),
        channels=tuple(range(teacher.hidden_size)),
        ffn=(tuple(range(teacher.ffn_size)),) * len(layers),
        groups=(tuple(range(teacher.num_groups)),) * len(layers),
        heads=(tuple(range(teacher.num_attention_heads)),) * len(layers),
        bottleneck=(tuple(range(bottleneck_size(teacher))),) * len(layers),
    )


def bottleneck_size(model: ModelConfig) -> int:
    """Return the number of units in the augmented shortcut's bottleneck, 0 without a shortcut."""
    return 0 if model.shortcut_reduction is None else model.hidden_size // model.shortcut_reduction


def is_as_wide(teacher: ModelConfig, student: ModelConfig) -> bool:
    """Return whether the student's layers have the same sizes as the teacher's."""
    sizes = [
        (model.hidden_size, model.ffn_size, model.num_groups, model.num_attention_heads) for model in (teacher, student)
    ]
    return sizes[0] == sizes[1] and bottleneck_size(teacher) in (0, bottleneck_size(student))


def check_student(teacher: ModelConfig, student: ModelConfig) -> None:
    """Raise ValueError if `student` cannot be cut from `teacher`: it is larger, or differs in architecture."""
    _check_sizes(teacher, student)
    if student.channels != teacher.channels:
        raise ValueError(
            f"model.inherit: the model has heads of {student.channels} channels and the teacher of {teacher.channels}, "
            f"but heads are kept whole; set model.head_size to {teacher.channels}"
        )
    same = ["attention_bias", "ffn_bias", "rotary_base", "rotary_scaling", "norm_epsilon"]
    # Additions that the teacher lacks are newly initialised in the student.
    if teacher.activation_terms > 1:
        same += ["activation_terms", "activation_scales"]
    if teacher.shortcut_reduction is not None:
        same += ["shortcut_input"]
        if student.shortcut_reduction is None:
            raise ValueError(
                "model.inherit: the teacher has an augmented shortcut and the model has none; set "
                f"model.shortcut_reduction, for example to the teacher's {teacher.shortcut_reduction}"
            )
    for field in same:
        own, others = getattr(student, field), getattr(teacher, field)
        if own != others:
            raise ValueError(
                f"model.inherit: the model has {field} {_show(own)} and the teacher {_show(others)}; set model.{field} "
                f"to {_show(others)}"
            )
    if student.tied_embeddings and not teacher.tied_embeddings:
        raise ValueError(
            "model.inherit: the model has tied_embeddings true and the teacher false, with separate embedding and "
            "head; set model.tied_embeddings to false"
        )


def _check_sizes(teacher: ModelConfig, student: ModelConfig) -> None:
    def per_group(model: ModelConfig) -> int:
        return model.num_attention_heads // model.num_groups

    sizes = [
        ("num_layers", student.num_layers, teacher.num_layers, "layers"),
        ("hidden_size", student.hidden_size, teacher.hidden_size, "channels"),
        ("ffn_hidden_size", student.ffn_size, teacher.ffn_size, "feed-forward neurons"),
        ("num_attention_heads", student.num_attention_heads, teacher.num_attention_heads, "query heads"),
        ("num_query_groups", student.num_groups, teacher.num_groups, "query groups"),
        ("num_attention_heads", per_group(student), per_group(teacher), "query heads per query group"),
    ]
    if teacher.shortcut_reduction is not None:
        units = "units in the shortcut's bottleneck"
        sizes.append(("shortcut_reduction", bottleneck_size(student), bottleneck_size(teacher), units))
    for field, own, others, what in sizes:
        if own > others:
            raise ValueError(
                f"model.inherit: the model has {own} {what} and the teacher {others}; "
                f"{'raise' if field == 'shortcut_reduction' else 'change'} model.{field}, or take a larger teacher"
            )


def _show(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def cut_depth(
    checkpoint: Path, teacher: ModelConfig, layers: Sequence[int], target: Path, rows: Sequence[int] | None = None
) -> ModelConfig:
    """Write the teacher reduced to `layers` to the folder `target`, and return its configuration.

    rows: as for `slice_checkpoint`.
    """
    cut = teacher.model_copy(update={"num_layers": len(layers)})
    slice_checkpoint(checkpoint, teacher, cut, whole_layers(teacher, layers), target, rows)
    return cut


def slice_checkpoint(
    checkpoint: Path,
    teacher: ModelConfig,
    student: ModelConfig,
    part: PruningPlan,
    target: Path,
    rows: Sequence[int] | None = None,
    seed: int = 0,
    record: Mapping[str, Any] | None = None,
) -> None:
    """Write to the folder `target` the student, whose weights are copied from the teacher's in `checkpoint`.

    rows: the teacher's token ids that a pruned vocabulary keeps, in its order; None: all. Additions that the teacher
    lacks are initialised as in training, with `seed`. `record` is added to the checkpoint's record. If only the teacher
    ties its embeddings, the student's head is a copy of the embedding. Memory holds one tensor of one layer at a time.
    Raises ValueError if the student cannot be cut from the teacher, or the checkpoint is damaged or not the teacher's.
    """
    check_student(teacher, student)
    weights = Weights(checkpoint)
    _check_teacher(weights, teacher)
    kept = range(read_checkpoint_record(checkpoint, "vocab_size")["vocab_size"]) if rows is None else rows
    shapes = shapes_of(student, padded_vocab_size(max(student.vocab_size or 0, len(kept))))

    def produce(name: str, layer: int | None) -> Tensor:
        if name in (EMBEDDING, HEAD):
            tensor = select_rows(weights.read(name if name in weights.shapes else EMBEDDING), kept)
            tensor = F.pad(tensor, (0, 0, 0, shapes[name][0] - len(tensor)))
            return tensor[:, torch.tensor(part.channels)]
        if layer is None:
            return weights.read(name)[torch.tensor(part.channels)]
        if name not in weights.shapes:
            return _start(name.removeprefix(LAYERS), student, layer, seed).to(weights.dtypes[EMBEDDING])
        tensor = weights.read(name, part.layers[layer])
        for axis, kind in enumerate(AXES[name.removeprefix(LAYERS)]):
            # All terms are kept, and an axis of size 1 is shared by the layer.
            if kind != "terms" and tensor.shape[axis] > 1:
                tensor = tensor.index_select(axis, torch.tensor(_numbers(kind, part, layer, teacher)))
        return tensor

    dtypes = {name: weights.dtypes.get(name, weights.dtypes[EMBEDDING]) for name in shapes}
    inherited = {"checkpoint": str(checkpoint), "layers": list(part.layers)}
    write_weights(
        target,
        {name: (shape, dtypes[name]) for name, shape in shapes.items()},
        produce,
        {"inherited_from": inherited, **(record or {}), "step": 0, "vocab_size": len(kept)},
    )


def _numbers(kind: str, part: PruningPlan, layer: int, teacher: ModelConfig) -> list[int]:
    """Return the indices to keep of an axis of this kind in the teacher's tensor for the student's `layer`."""
    if kind == "channels":
        return list(part.channels)
    if kind == "ffn":
        return list(part.ffn[layer])
    if kind == "gate_and_up":
        return [half + neuron for half in (0, teacher.ffn_size) for neuron in part.ffn[layer]]
    if kind == "bottleneck":
        return list(part.bottleneck[layer])
    heads = part.heads[layer]
    if kind == "attended":
        return _channels_of(heads, teacher)
    assert kind == "qkv"
    per_group = teacher.num_attention_heads // teacher.num_groups
    blocks = []
    for group in part.groups[layer]:
        first = group * (per_group + 2)
        blocks += [first + head % per_group for head in heads if head // per_group == group]
        blocks += [first + per_group, first + per_group + 1]
    return _channels_of(blocks, teacher)


def _channels_of(heads: Sequence[int], teacher: ModelConfig) -> list[int]:
    size = teacher.channels
    return [head * size + channel for head in heads for channel in range(size)]


def _start(name: str, student: ModelConfig, layer: int, seed: int) -> Tensor:
    """Return the initial value of an addition's tensor, float32, as described in `trainer.pangu`."""
    shape = shapes_of(student, 0)[f"{LAYERS}{name}"][1:]
    start = torch.zeros(shape)
    if name == SCALE:
        start[0] = 1
    elif name == OFFSET:
        start += torch.tensor(initial_offsets(student.activation_terms))[:, None]
    elif name == DOWN:
        start.normal_(std=student.init_std, generator=torch.Generator().manual_seed(seed + layer))
    else:
        assert name == UP
    return start


def _check_teacher(weights: Weights, teacher: ModelConfig) -> None:
    """Raise ValueError if the weights are not those of `teacher`."""
    found = weights.shapes
    difference = find_difference(found, shapes_of(teacher, found.get(EMBEDDING, (0,))[0]))
    if difference is not None:
        name, stored, described = difference
        raise ValueError(
            f"model.inherit: {weights.checkpoint}: {name} is {stored} there, but {described} according to the "
            "teacher's configuration; give the configuration that it was trained with"
        )
