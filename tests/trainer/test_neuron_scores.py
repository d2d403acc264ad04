"""Sums over weights compared with brute force, and the neurons that are kept."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer.test_pruning import STUDENT, TEACHER, VOCAB_SIZE, expect_layer, with_fields, write_random
from trainer.checkpoint_shapes import EMBEDDING, HEAD
from trainer.config import ModelConfig
from trainer.neuron_scores import Scores, choose, keep_best, sum_values
from trainer.pruning import PruningPlan, bottleneck_size, whole_layers
from trainer.weights import Weights, write_weights

DEPTH_CUT = with_fields(STUDENT, num_layers=TEACHER.num_layers)


def without(part: PruningPlan, **fields: Any) -> PruningPlan:
    return part.model_copy(update=fields)


def total(tensors: dict[str, Tensor], model: ModelConfig, part: PruningPlan, power: int) -> float:
    """Return the sum over all that stays of a model."""
    channels = list(part.channels)
    found = [tensors["decoder.final_layernorm.weight"][channels]]
    found += [tensors[name][:VOCAB_SIZE, channels] for name in (EMBEDDING, HEAD) if name in tensors]
    for place in range(len(part.layers)):
        found += expect_layer(tensors, model, part, place).values()
    return sum(float((tensor.double().abs() ** power).sum()) for tensor in found)


def drop(numbers: tuple[int, ...], number: int) -> tuple[int, ...]:
    return tuple(each for each in numbers if each != number)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tied_embeddings": True, "num_query_groups": None, "attention_bias": "qkv", "activation_scales": "layer"},
        {"activation_terms": 1, "shortcut_reduction": None, "attention_bias": "none", "ffn_bias": False},
    ],
)
@pytest.mark.parametrize("power", [1, 2])
def test_a_score_is_what_goes_with_the_neuron(fields: dict[str, Any], power: Any, tmp_path: Path) -> None:
    """All that is cut off, together with the neuron alone, by the same slicing that tests of slicing use as truth."""
    model = with_fields(TEACHER, num_layers=2, **fields)
    tensors = write_random(tmp_path / "teacher", model)
    scores = sum_values(Weights(tmp_path / "teacher"), model, power)
    whole = whole_layers(model, range(2))
    everything = total(tensors, model, whole, power)

    def lost(part: PruningPlan) -> float:
        difference = everything - total(tensors, model, part, power)
        return difference ** (1 / power)

    size = model.num_attention_heads // model.num_groups
    for channel in (0, 7, 15):
        part = without(whole, channels=drop(whole.channels, channel))
        assert float(scores.channels[channel]) == pytest.approx(lost(part))
    for neuron in (0, 11, 19):
        part = without(whole, ffn=(whole.ffn[0], drop(whole.ffn[1], neuron)))
        assert float(scores.ffn[1, neuron]) == pytest.approx(lost(part))
    for head in range(model.num_attention_heads):
        part = without(whole, heads=(whole.heads[0], drop(whole.heads[1], head)))
        assert float(scores.heads[1, head]) == pytest.approx(lost(part))
    for group in range(model.num_groups):
        heads = tuple(head for head in whole.heads[0] if head // size != group)
        part = without(whole, groups=(drop(whole.groups[0], group), whole.groups[1]), heads=(heads, whole.heads[1]))
        assert float(scores.groups[0, group]) == pytest.approx(lost(part))
    for unit in range(bottleneck_size(model)):
        part = without(whole, bottleneck=(whole.bottleneck[0], drop(whole.bottleneck[1], unit)))
        assert float(scores.bottleneck[1, unit]) == pytest.approx(lost(part))


def kill(tensors: dict[str, Tensor], model: ModelConfig, part: PruningPlan) -> None:
    """Set to zero all that does not stay of a model, by numbers that `part` does not have."""
    size, of = model.channels, model.num_attention_heads // model.num_groups
    dead = [channel for channel in range(model.hidden_size) if channel not in part.channels]
    outputs = ("linear_proj.weight", "linear_proj.bias", "linear_fc2.weight", "linear_fc2.bias", "bda.up")
    for name, tensor in tensors.items():
        if name.endswith(outputs):
            tensor[:, dead] = 0
        elif tensor.shape[-1] == model.hidden_size:
            tensor[..., dead] = 0
        for layer in range(model.num_layers):
            if name.startswith("decoder.layers."):
                _kill_in_layer(name, tensor[layer], model, part, layer, size, of)


def _kill_in_layer(
    name: str, tensor: Tensor, model: ModelConfig, part: PruningPlan, layer: int, size: int, of: int
) -> None:
    for neuron in range(model.ffn_size):
        if neuron not in part.ffn[layer]:
            if "linear_fc1" in name and "norm" not in name:
                tensor[[neuron, model.ffn_size + neuron]] = 0
            elif name.endswith("linear_fc2.weight") or "activation_func" in name:
                tensor[:, neuron] = 0
    for head in range(model.num_attention_heads):
        group = head // of
        if head not in part.heads[layer]:
            start = (group * (of + 2) + head % of) * size
            if "linear_qkv" in name and "norm" not in name:
                tensor[start : start + size] = 0
            elif name.endswith("linear_proj.weight"):
                tensor[:, head * size : (head + 1) * size] = 0
        if group not in part.groups[layer] and "linear_qkv" in name and "norm" not in name:
            tensor[(group * (of + 2) + of) * size : (group + 1) * (of + 2) * size] = 0
    for unit in range(bottleneck_size(model)):
        if unit not in part.bottleneck[layer]:
            if name.endswith("bda.down"):
                tensor[unit] = 0
            elif name.endswith("bda.up"):
                tensor[:, unit] = 0


@pytest.mark.parametrize("power", [1, 2])
def test_what_is_dead_goes(power: Any, tmp_path: Path) -> None:
    from tests.trainer.test_pruning import random_plan

    alive = random_plan(TEACHER, DEPTH_CUT, range(3), seed=5)
    tensors = write_random(tmp_path / "random", TEACHER)
    kill(tensors, TEACHER, alive)
    write_weights(
        tmp_path / "teacher",
        {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()},
        lambda name, layer: tensors[name] if layer is None else tensors[name][layer],
        {"step": 0, "vocab_size": VOCAB_SIZE},
    )
    assert choose(Weights(tmp_path / "teacher"), TEACHER, DEPTH_CUT, power) == alive


def test_of_equal_scores_the_first_stay() -> None:
    scores = Scores(
        channels=torch.tensor([1.0, 3, 2, 3] * 4),
        ffn=torch.ones(3, 20),
        groups=torch.tensor([[1.0, 2, 2], [5, 5, 5], [0, 1, 0]]),
        heads=torch.tensor([[9.0, 9, 1, 1, 1, 2], [1, 2, 4, 3, 9, 9], [3, 3, 3, 4, 5, 5]]),
        bottleneck=torch.zeros(3, 8),
    )
    part = keep_best(scores, TEACHER, DEPTH_CUT)
    assert part.channels == (1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15)
    assert part.ffn == (tuple(range(9)),) * 3
    assert part.groups == ((1, 2), (0, 1), (0, 1))
    assert part.heads == ((2, 5), (1, 2), (0, 3))
    assert part.bottleneck == ((0, 1, 2),) * 3
