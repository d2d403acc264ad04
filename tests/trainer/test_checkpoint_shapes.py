"""Shapes of a model's weights, compared with a real checkpoint, and models that cannot start from it."""

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
        ({}, 280, "was trained with a tokenizer of 300 entries, but this one has 280; use that tokenizer, or"),
        ({"vocab_size": 500}, 300, "embedding.word_embeddings.weight is 384 x 32 there, but 512 x 32 in the model;"),
        ({"num_layers": 3}, 300, "decoder.layers.self_attention.linear_qkv.weight is 2 x 64 x 32 there, but 3 x"),
        ({"shortcut_reduction": None}, 300, "self_attn_bda.down is 2 x 8 x 32 there, but missing in the model;"),
        ({"activation_terms": 1}, 300, "there, but missing in the model; configure the model as the checkpoint's, or"),
        ({"activation_terms": 4}, 300, "mlp.activation_func.scale is 2 x 3 x 64 there, but 2 x 4 x 64 in the model;"),
    ],
)
def test_a_model_that_a_checkpoint_is_not_of_is_named(
    checkpoint: Path, fields: dict[str, Any], vocab_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_start(checkpoint, TINY_MODEL.model_copy(update=fields), vocab_size)


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not an intact checkpoint \(it has no reprise.json\); give a step-… folder"):
        check_start(tmp_path, TINY_MODEL, 300)
