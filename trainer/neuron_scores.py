"""Importance scores of neurons: sums over all their weights of |w| (L1), of w² (L2), or of given values.

Reads a checkpoint of weights or of |weight · gradient| (Taylor) tensor by tensor in one process, so that scores do not
depend on the layout that wrote it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trainer.checkpoint_folder import read_checkpoint_record
from trainer.checkpoint_shapes import EMBEDDING, HEAD
from trainer.config import ModelConfig
from trainer.pruning import AXES, DOWN, UP, PruningPlan, bottleneck_size
from trainer.weights import LAYERS, Weights

_VALUES_AT_ONCE = 2**22


@dataclass(frozen=True)
class Scores:
    """Importance scores by kind, float64: channels [h]; all others [layers, number of units]."""

    channels: Tensor
    ffn: Tensor
    groups: Tensor
    heads: Tensor
    bottleneck: Tensor


def choose(values: Weights, teacher: ModelConfig, student: ModelConfig, power: Literal[1, 2] = 1) -> PruningPlan:
    """Return the pruning plan that keeps the neurons with the highest sums of |value|^power.

    values: a checkpoint of the teacher's weights, or of values of the same shapes. The teacher must have as many layers
    as the student.
    """
    return keep_best(sum_values(values, teacher, power), teacher, student)


def keep_best(scores: Scores, teacher: ModelConfig, student: ModelConfig) -> PruningPlan:
    """Return the pruning plan that keeps the highest scores, as many of each kind as in `student`.

    Of equal scores, the first are kept. Within each kept query group, its best heads are kept.
    """
    assert student.num_layers == teacher.num_layers
    groups = [_best(row, student.num_groups) for row in scores.groups]
    size = teacher.num_attention_heads // teacher.num_groups
    count = student.num_attention_heads // student.num_groups
    heads = [
        [group * size + head for group in kept for head in _best(row[group * size : (group + 1) * size], count)]
        for row, kept in zip(scores.heads, groups, strict=True)
    ]
    # If the teacher has no shortcut, the student's is newly initialised.
    units = bottleneck_size(student) if bottleneck_size(teacher) else 0
    return PruningPlan(
        layers=tuple(range(teacher.num_layers)),
        channels=tuple(_best(scores.channels, student.hidden_size)),
        ffn=tuple(tuple(_best(row, student.ffn_size)) for row in scores.ffn),
        groups=tuple(tuple(each) for each in groups),
        heads=tuple(tuple(each) for each in heads),
        bottleneck=tuple(tuple(_best(row, units)) for row in scores.bottleneck),
    )


def _best(scores: Tensor, count: int) -> list[int]:
    return sorted(torch.sort(scores, descending=True, stable=True).indices[:count].tolist())


def sum_bottlenecks(values: Weights, model: ModelConfig) -> Tensor:
    """Return the L2 scores of the bottlenecks' units, [layers, units], reading only the shortcuts' weights."""
    return sum_values(values, model, 2, [name for name in values.shapes if name.endswith((DOWN, UP))]).bottleneck


def sum_values(values: Weights, model: ModelConfig, power: Literal[1, 2], names: Iterable[str] | None = None) -> Scores:
    """Return each neuron's sum of |value|^power over all its values; for power 2, the square root of the sum.

    names: the tensors to read, by default all.
    """
    depth, heads, groups = model.num_layers, model.num_attention_heads, model.num_groups
    sums = {
        "channels": torch.zeros(model.hidden_size, dtype=torch.float64),
        "ffn": torch.zeros(depth, model.ffn_size, dtype=torch.float64),
        "groups": torch.zeros(depth, groups, dtype=torch.float64),
        "heads": torch.zeros(depth, heads, dtype=torch.float64),
        "bottleneck": torch.zeros(depth, bottleneck_size(model), dtype=torch.float64),
    }
    # Rows that pad the vocabulary are untrained.
    vocab_size = read_checkpoint_record(values.checkpoint, "vocab_size")["vocab_size"]
    for name in values.shapes if names is None else names:
        if not name.startswith(LAYERS):
            tensor = values.read(name)[:vocab_size] if name in (EMBEDDING, HEAD) else values.read(name)
            sums["channels"] += _along(tensor, tensor.ndim - 1, power)
            continue
        axes = AXES[name.removeprefix(LAYERS)]
        for layer in range(depth):
            tensor = values.read(name, layer)
            for axis, kind in enumerate(axes):
                # Scales shared by a layer belong to no single neuron.
                if kind != "terms" and not (kind == "ffn" and tensor.shape[axis] == 1):
                    _add({**sums, **_rows(sums, layer)}, kind, _along(tensor, axis, power))
    return Scores(**{kind: each.sqrt() if power == 2 else each for kind, each in sums.items()})


def _rows(sums: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    return {kind: each[layer] for kind, each in sums.items() if kind != "channels"}


def _along(tensor: Tensor, axis: int, power: int) -> Tensor:
    """Return the sums of |value|^power over all axes except `axis`, float64, a block of rows at a time."""
    rows = max(1, _VALUES_AT_ONCE * len(tensor) // max(1, tensor.numel()))
    sums = []
    for block in torch.split(tensor, rows):
        powers = block.double().abs_().pow_(power)
        sums.append(powers.movedim(axis, 0).reshape(block.shape[axis], -1).sum(dim=1))
    return torch.cat(sums) if axis == 0 else torch.stack(sums).sum(dim=0)


def _add(sums: dict[str, Tensor], kind: str, found: Tensor) -> None:
    """Add `found`, the sums along an axis of this kind, to the totals of the units that the axis covers."""
    if kind == "gate_and_up":
        sums["ffn"] += found.view(2, -1).sum(dim=0)
    elif kind in ("qkv", "attended"):
        groups = len(sums["groups"])
        size = len(sums["heads"]) // groups
        # A group's blocks: its query heads and, for qkv, its key and its value.
        blocks = found.view(groups, size + 2 if kind == "qkv" else size, -1).sum(dim=2)
        sums["groups"] += blocks.sum(dim=1)
        sums["heads"] += blocks[:, :size].flatten()
    else:
        sums[kind] += found
