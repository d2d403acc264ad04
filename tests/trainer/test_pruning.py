"""Slices of a teacher, compared element by element, and invalid students."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.plain_model import read_checkpoint
from trainer.checkpoint_folder import find_damage, read_checkpoint_record
from trainer.checkpoint_shapes import EMBEDDING, HEAD, shapes_of
from trainer.config import ModelConfig
from trainer.pruning import PruningPlan, check_student, cut_depth, slice_checkpoint
from trainer.weights import write_weights

VOCAB_SIZE, ROWS = 200, 256
TEACHER = ModelConfig(
    num_layers=3,
    hidden_size=16,
    num_attention_heads=6,
    num_query_groups=3,
    head_size=4,
    ffn_hidden_size=20,
    attention_bias="all",
    ffn_bias=True,
    activation_terms=3,
    shortcut_reduction=2,
)
STUDENT = TEACHER.model_copy(
    update={
        "num_layers": 2,
        "hidden_size": 12,
        "num_attention_heads": 2,
        "num_query_groups": 2,
        "ffn_hidden_size": 9,
        "shortcut_reduction": 4,
    }
)


def with_fields(model: ModelConfig, **fields: Any) -> ModelConfig:
    return model.model_copy(update=fields)


def write_random(folder: Path, model: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Write a checkpoint of random weights, padding included, and return them."""
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes_of(model, ROWS).items()
    }
    write_weights(
        folder,
        {name: (tuple(tensor.shape), dtype) for name, tensor in tensors.items()},
        lambda name, layer: tensors[name] if layer is None else tensors[name][layer],
        {"step": 7, "vocab_size": VOCAB_SIZE},
    )
    return tensors


def random_plan(teacher: ModelConfig, student: ModelConfig, layers: Sequence[int], seed: int = 0) -> PruningPlan:
    generator = random.Random(seed)

    def draw(of: int, count: int) -> tuple[int, ...]:
        return tuple(sorted(generator.sample(range(of), count)))

    groups = [draw(teacher.num_groups, student.num_groups) for _ in layers]
    of, count = (model.num_attention_heads // model.num_groups for model in (teacher, student))
    return PruningPlan(
        layers=tuple(layers),
        channels=draw(teacher.hidden_size, student.hidden_size),
        ffn=tuple(draw(teacher.ffn_size, student.ffn_size) for _ in layers),
        groups=tuple(groups),
        heads=tuple(tuple(group * of + head for group in each for head in draw(of, count)) for each in groups),
        bottleneck=tuple(
            draw(teacher.hidden_size // teacher.shortcut_reduction, student.hidden_size // student.shortcut_reduction)
            if teacher.shortcut_reduction and student.shortcut_reduction
            else ()
            for _ in layers
        ),
    )


def expect_layer(teacher: dict[str, Tensor], model: ModelConfig, part: PruningPlan, place: int) -> dict[str, Tensor]:
    """Return a student layer's tensors, gathered one row and one column after the other."""
    old = {
        name.removeprefix("decoder.layers."): tensor[part.layers[place]]
        for name, tensor in teacher.items()
        if name.startswith("decoder.layers.")
    }
    size, of = model.channels, model.num_attention_heads // model.num_groups
    qkv, attended = [], []
    for group in part.groups[place]:
        start = group * (of + 2) * size
        for head in part.heads[place]:
            if head // of == group:
                for channel in range(size):
                    qkv.append(start + (head - group * of) * size + channel)
                    attended.append(head * size + channel)
        for channel in range(2 * size):
            qkv.append(start + of * size + channel)
    gate_and_up = [*part.ffn[place], *(model.ffn_size + neuron for neuron in part.ffn[place])]
    channels, ffn, bottleneck = part.channels, part.ffn[place], part.bottleneck[place]
    axes: dict[str, tuple[Sequence[int], ...]] = {
        "self_attention.linear_qkv.weight": (qkv, channels),
        "self_attention.linear_qkv.layer_norm_weight": (channels,),
        "self_attention.linear_qkv.bias": (qkv,),
        "self_attention.linear_proj.weight": (channels, attended),
        "self_attention.linear_proj.bias": (channels,),
        "mlp.linear_fc1.weight": (gate_and_up, channels),
        "mlp.linear_fc1.layer_norm_weight": (channels,),
        "mlp.linear_fc1.bias": (gate_and_up,),
        "mlp.linear_fc2.weight": (channels, ffn),
        "mlp.linear_fc2.bias": (channels,),
        "mlp.activation_func.scale": (range(3), ffn if model.activation_scales == "channel" else [0]),
        "mlp.activation_func.offset": (range(3), ffn if model.activation_scales == "channel" else [0]),
        "self_attn_bda.down": (bottleneck, channels),
        "self_attn_bda.up": (channels, bottleneck),
    }
    return {name: gather(tensor, axes[name]) for name, tensor in old.items()}


def gather(tensor: Tensor, axes: tuple[Sequence[int], ...]) -> Tensor:
    if len(axes) == 1:
        return torch.stack([tensor[row] for row in axes[0]])
    return torch.stack([torch.stack([tensor[row, column] for column in axes[1]]) for row in axes[0]])


@pytest.mark.parametrize(
    ("fields", "student_fields"),
    [
        ({}, {}),
        # No grouping, one head a student's group, scales that a layer has in common.
        ({"num_query_groups": None, "activation_scales": "layer"}, {"num_query_groups": None}),
        ({"tied_embeddings": True, "attention_bias": "qkv", "ffn_bias": False}, {}),
        ({"tied_embeddings": True, "activation_terms": 1, "shortcut_reduction": None}, {"tied_embeddings": False}),
    ],
)
def test_every_element_is_the_teacher_s(fields: dict[str, Any], student_fields: dict[str, Any], tmp_path: Path) -> None:
    teacher = with_fields(TEACHER, **fields)
    student = with_fields(with_fields(STUDENT, **fields), num_query_groups=2, shortcut_reduction=None)
    if teacher.shortcut_reduction is not None:
        student = with_fields(student, shortcut_reduction=4)
    student = with_fields(student, **student_fields)
    old = write_random(tmp_path / "teacher", teacher)
    part = random_plan(teacher, student, layers=[0, 2])
    rows = [5, 199, 17, *range(60, 190)]
    for kept in (None, rows):
        target = tmp_path / f"student-{kept is None}"
        slice_checkpoint(tmp_path / "teacher", teacher, student, part, target, kept, record={"fingerprint": "f"})
        assert find_damage(target) is None
        record = read_checkpoint_record(target)
        ids = list(range(VOCAB_SIZE)) if kept is None else kept
        assert (record["step"], record["vocab_size"], record["fingerprint"]) == (0, len(ids), "f")
        assert record["inherited_from"] == {"checkpoint": str(tmp_path / "teacher"), "layers": [0, 2]}
        new = read_checkpoint(target)
        assert {name: tuple(tensor.shape) for name, tensor in new.items()} == shapes_of(student, 256)
        assert torch.equal(
            new["decoder.final_layernorm.weight"], gather(old["decoder.final_layernorm.weight"], (part.channels,))
        )
        for name in (EMBEDDING, HEAD):
            if name in new:
                source = old[EMBEDDING if teacher.tied_embeddings else name]
                assert torch.equal(new[name][: len(ids)], gather(source, (ids, part.channels))), name
                assert not new[name][len(ids) :].any()
        assert (HEAD in new) == (not student.tied_embeddings)
        for place in range(2):
            expected = expect_layer(old, teacher, part, place)
            for name, tensor in expected.items():
                assert torch.equal(new[f"decoder.layers.{name}"][place], tensor), name


def test_what_the_teacher_lacks_starts_as_training_starts_it(tmp_path: Path) -> None:
    teacher = with_fields(TEACHER, activation_terms=1, shortcut_reduction=None)
    write_random(tmp_path / "teacher", teacher, torch.bfloat16)
    part = random_plan(teacher, with_fields(STUDENT, shortcut_reduction=None), [0, 2])
    for scales in ("channel", "layer"):
        student = with_fields(STUDENT, activation_scales=scales, shortcut_reduction=4, init_std=0.5)
        slice_checkpoint(tmp_path / "teacher", teacher, student, part, tmp_path / scales, seed=4)
        new = read_checkpoint(tmp_path / scales)
        assert {tensor.dtype for tensor in new.values()} == {torch.bfloat16}
        scale, offset = (new[f"decoder.layers.mlp.activation_func.{name}"] for name in ("scale", "offset"))
        assert scale.shape == (2, 3, 9 if scales == "channel" else 1)
        assert (scale[:, 0] == 1).all() and not scale[:, 1:].any() and not offset[:, 0].any()
        # silu of the two others is 0.1 and -0.1.
        torch.testing.assert_close(torch.nn.functional.silu(offset[:, 1].float()).mean().item(), 0.1, atol=1e-3, rtol=0)
        torch.testing.assert_close(
            torch.nn.functional.silu(offset[:, 2].float()).mean().item(), -0.1, atol=1e-3, rtol=0
        )
        down, up = (new[f"decoder.layers.self_attn_bda.{name}"] for name in ("down", "up"))
        assert up.shape == (2, 12, 3) and not up.any()
        assert down.float().std().item() == pytest.approx(0.5, rel=0.2)
        assert not torch.equal(down[0], down[1])


def test_layers_alone_stay_whole(tmp_path: Path) -> None:
    old = write_random(tmp_path / "teacher", TEACHER)
    cut = cut_depth(tmp_path / "teacher", TEACHER, [0, 2], tmp_path / "cut", [3, 1])
    assert cut == with_fields(TEACHER, num_layers=2)
    new = read_checkpoint(tmp_path / "cut")
    assert new.keys() == old.keys()
    for name, tensor in new.items():
        if name in (EMBEDDING, HEAD):
            assert torch.equal(tensor[:2], old[name][[3, 1]])
        elif name.startswith("decoder.layers."):
            assert torch.equal(tensor, old[name][[0, 2]])
        else:
            assert torch.equal(tensor, old[name])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_layers": 4}, "has 4 layers and the teacher 3; change model.num_layers, or take a larger teacher"),
        ({"hidden_size": 20, "num_attention_heads": 5, "num_query_groups": 1}, "has 20 channels and the teacher 16; "),
        ({"ffn_hidden_size": 21}, "has 21 feed-forward neurons and the teacher 20; change model.ffn_hidden_size"),
        ({"num_attention_heads": 8}, "has 8 query heads and the teacher 6; change model.num_attention_heads"),
        ({"num_attention_heads": 4, "num_query_groups": 4}, "has 4 query groups and the teacher 3; "),
        ({"num_attention_heads": 6}, "has 3 query heads per query group and the teacher 2; "),
        ({"shortcut_reduction": 1}, "has 12 units in the shortcut's bottleneck and the teacher 8; raise model.short"),
        ({"head_size": 6}, "has heads of 6 channels and the teacher of 4, but heads are kept whole; set model.head"),
        ({"head_size": None}, "has heads of 6 channels and the teacher of 4"),
        ({"attention_bias": "qkv"}, "has attention_bias qkv and the teacher all; set model.attention_bias to all"),
        ({"ffn_bias": False}, "has ffn_bias false and the teacher true"),
        ({"rotary_base": 500}, "has rotary_base 500 and the teacher 10000"),
        ({"rotary_scaling": 8.0}, "has rotary_scaling 8.0 and the teacher null; set model.rotary_scaling to null"),
        ({"norm_epsilon": 1e-6}, "has norm_epsilon 1e-06 and the teacher 1e-05"),
        ({"activation_terms": 2}, "has activation_terms 2 and the teacher 3"),
        ({"activation_scales": "layer"}, "has activation_scales layer and the teacher channel"),
        ({"shortcut_input": "residual"}, "has shortcut_input residual and the teacher normalised"),
        ({"shortcut_reduction": None}, "the teacher has an augmented shortcut and the model has none; set model.short"),
        ({"tied_embeddings": True}, "has tied_embeddings true and the teacher false, with separate embedding and head"),
    ],
)
def test_no_part_of_the_teacher_is_refused_in_one_line(fields: dict[str, Any], message: str) -> None:
    check_student(TEACHER, STUDENT)
    with pytest.raises(ValueError, match=r"^model.inherit: [^\n]*$") as caught:
        check_student(TEACHER, with_fields(STUDENT, **fields))
    assert message in str(caught.value)


def test_another_teacher_s_checkpoint_leaves_nothing_behind(tmp_path: Path) -> None:
    write_random(tmp_path / "teacher", TEACHER)
    other = with_fields(TEACHER, ffn_bias=False)
    student = with_fields(STUDENT, ffn_bias=False)
    with pytest.raises(
        ValueError, match=r"^model.inherit: .*decoder.layers.mlp.linear_fc1.bias is 3 x 40 there, but missing"
    ):
        slice_checkpoint(tmp_path / "teacher", other, student, random_plan(other, student, [0, 1]), tmp_path / "cut")
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]
