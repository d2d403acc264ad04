"""What shapes a model's weights have in a checkpoint, against a real one, and which models cannot start from it."""

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.plain_model import read_checkpoint
from tests.conftest import TINY_MODEL
from trainer.checkpoint_folder import list_checkpoints
from trainer.checkpoint_shapes import check_start, read_shapes, shapes_of


@pytest.fixture
def checkpoint(trained: Path) -> Path:
    return list_checkpoints(trained / "checkpoint")[-1]


def test_shapes_are_those_of_a_real_checkpoint(checkpoint: Path) -> None:
    real = {name: tuple(tensor.shape) for name, tensor in read_checkpoint(checkpoint).items()}
    assert read_shapes(checkpoint) == real
    assert shapes_of(TINY_MODEL, 384) == real
    assert sum(tensor.numel() for tensor in read_checkpoint(checkpoint).values()) == TINY_MODEL.num_parameters(384)
    check_start(checkpoint, TINY_MODEL, 300)
    check_start(checkpoint, TINY_MODEL, None)


@pytest.mark.parametrize(
    ("fields", "vocab_size", "message"),
    [
        ({}, 280, "was trained with a tokenizer of 300 entries and this one has 280; give that tokenizer, or cut"),
        ({"vocab_size": 500}, 300, "has 384 x 32 as embedding.word_embeddings.weight, and the model 512 x 32;"),
        ({"num_layers": 3}, 300, "has 2 x 64 x 32 as decoder.layers.self_attention.linear_qkv.weight, and the model 3"),
        ({"shortcut_reduction": None}, 300, "has 2 x 8 x 32 as decoder.layers.self_attn_bda.down, and the model noth"),
        ({"activation_terms": 1}, 300, "as decoder.layers.mlp.activation_func.offset, and the model nothing; describe"),
        ({"activation_terms": 4}, 300, "has 2 x 3 x 64 as decoder.layers.mlp.activation_func.scale, and the model 2 x"),
    ],
)
def test_a_model_that_a_checkpoint_is_not_of_is_named(
    checkpoint: Path, fields: dict[str, Any], vocab_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_start(checkpoint, TINY_MODEL.model_copy(update=fields), vocab_size)


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no whole checkpoint \(it has no reprise.json\); give a step-… folder"):
        check_start(tmp_path, TINY_MODEL, 300)
