"""Presets: model sizes, the fields that they fill in, and invalid configurations."""

import re
from typing import Any

import pytest
from pydantic import ValidationError

from trainer.config import ModelConfig, TrainConfig
from trainer.parallel_config import ParallelConfig, check_layout
from trainer.presets import PRESETS


def test_the_closed_form_counts_the_parameters_of_the_models_that_are_built(found: list[dict[str, Any]]) -> None:
    sizes = found[0]["sizes"]
    assert sizes.keys() == PRESETS.keys()
    for name, (closed_form, counted) in sizes.items():
        assert closed_form == counted, name


@pytest.mark.parametrize(
    ("name", "vocab_size", "expected"),
    [
        # Embedding and head, layers of attention, feed-forward, norms, activation and shortcut, and the last norm.
        (
            "pangu-pi-1b",
            100_883,
            413_216_768 + 12 * (16_777_216 + 34_603_008 + 4096 + 22_528 + 262_144) + 2048,
        ),
        (
            "pangu-pi-1b-pro",
            48_000,
            172_032_000 + 21 * (12_845_056 + 26_148_864 + 3584 + 19_456 + 200_704) + 1792,
        ),
        (
            "pangu-pi-1.5b-pro",
            48_000,
            196_608_000 + 22 * (16_777_216 + 42_467_328 + 4096 + 27_648 + 262_144) + 2048,
        ),
    ],
)
def test_the_paper_s_models(name: str, vocab_size: int, expected: int) -> None:
    model = ModelConfig(preset=name)
    assert model.vocab_size == vocab_size
    assert model.num_parameters(vocab_size) == expected


@pytest.mark.parametrize(
    ("num_layers", "vocab_size", "share"), [(20, 48_000, "18.07%"), (15, 100_883, "38.20%")], ids=["compact", "whole"]
)
def test_the_paper_s_shares_of_embedding_and_head_are_of_one_width(
    num_layers: int, vocab_size: int, share: str
) -> None:
    """The authors' configuration has 20 layers, and is plain LLaMA; with the larger vocabulary, 15 cost as much."""
    model = ModelConfig(preset="pangu-pi-1b-pro", num_layers=num_layers, activation_terms=1, shortcut_reduction=None)
    assert (model.hidden_size, model.ffn_size, model.num_attention_heads) == (1792, 4864, 14)
    layer = 4 * 1792**2 + 3 * 1792 * 4864 + 2 * 1792
    embeddings = 2 * vocab_size * 1792
    assert model.num_parameters(vocab_size) == embeddings + num_layers * layer + 1792
    assert f"{model.embedding_share(vocab_size):.2%}" == share
    assert f"{embeddings / (embeddings + num_layers * layer + 1792):.2%}" == share
    # What the smaller vocabulary saves is spent on depth: both have as many parameters.
    assert model.num_parameters(vocab_size) == pytest.approx(949e6, rel=0.005)


def test_1_5b_pro_has_the_parameters_of_its_name() -> None:
    plain = {"preset": "pangu-pi-1.5b-pro", "activation_terms": 1, "shortcut_reduction": None}
    assert ModelConfig.model_validate(plain).num_parameters(48_000) == 1_500_080_128
    # Half as wide, half the width of the layer: the expansion is the preset's.
    half = {**plain, "hidden_size": 1024, "num_attention_heads": 8}
    assert ModelConfig.model_validate(half).ffn_size == 3584


def test_a_preset_fills_what_is_not_given() -> None:
    model = ModelConfig(preset="pangu-pi-1b-pro", num_layers=20, shortcut_reduction=None)
    assert (model.hidden_size, model.num_layers, model.ffn_size) == (1792, 20, 4864)
    assert (model.activation_terms, model.shortcut_reduction) == (2, None)
    # A run's folder holds every field: read again it is the same.
    assert ModelConfig.model_validate(model.model_dump()) == model
    assert ModelConfig.model_validate_json(model.model_dump_json()) == model
    assert ModelConfig(preset="llama").model_copy(update={"preset": None}) == ModelConfig()


@pytest.mark.parametrize("name", [name for name in PRESETS if re.search(r"\d", name)])
def test_names_say_how_large_models_are(name: str) -> None:
    number, unit = re.search(r"([\d.]+)([mb])", name).groups()  # type: ignore[union-attr]
    model = ModelConfig(preset=name)
    size = model.num_parameters(model.vocab_size or 2048)
    assert size == pytest.approx(float(number) * {"m": 1e6, "b": 1e9}[unit], rel=0.25)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preset": "gpt"}, "preset: 'gpt' is not a preset; choose one of pangu-pi-1b, "),
        ({"hidden_size": 100, "num_attention_heads": 3}, "num_attention_heads: 3 does not divide hidden_size 100;"),
        ({"shortcut_reduction": 24}, "shortcut_reduction: 24 does not divide hidden_size 128; choose a divisor"),
    ],
)
def test_impossible_models_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as error:
        ModelConfig(**fields)
    [detail] = error.value.errors()
    assert str(detail["ctx"]["error"]).startswith(message)


@pytest.mark.parametrize(
    ("parallel", "seq_length", "message"),
    [
        (ParallelConfig(tensor=3), 32, "parallel.tensor: 3 does not divide model.num_attention_heads 4"),
        (ParallelConfig(tensor=2, sequence=True), 33, "parallel.tensor 2 does not divide corpus.seq_length 33"),
        (
            ParallelConfig(pipeline=2, virtual_pipeline=3),
            32,
            "parallel.virtual_pipeline: parallel.pipeline 2 x 3 chunks "
            "do not divide model.num_layers 4; change one of them",
        ),
        (
            ParallelConfig(pipeline=2, virtual_pipeline=2, data=8),
            32,
            "parallel.virtual_pipeline: 2 needs a multiple of "
            r"parallel.pipeline 2 microbatches a step, but train.global_batch_size 16 / \(train.micro_batch_size 2 x "
            r"parallel.data 8\) is 1; change one of them, or set it to 1",
        ),
    ],
)
def test_impossible_layouts_are_named(parallel: ParallelConfig, seq_length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_layout(ModelConfig(), TrainConfig(), parallel, seq_length)


def test_a_sequence_is_shared_by_several_ranks() -> None:
    with pytest.raises(ValidationError, match="sequence: true needs tensor-parallel ranks, but tensor is 1"):
        ParallelConfig(sequence=True)


def test_a_preset_of_another_width_keeps_its_expansion() -> None:
    """8/3 of 896, rounded up to a multiple of 256, is 2560; a width of the layer that is given stays."""
    fields = {"preset": "pangu-pi-1b-pro", "hidden_size": 896, "num_attention_heads": 7}
    assert ModelConfig.model_validate(fields).ffn_size == 2560
    assert ModelConfig.model_validate({**fields, "ffn_hidden_size": 1024}).ffn_size == 1024
    assert ModelConfig.model_validate(ModelConfig.model_validate(fields).model_dump()).ffn_size == 2560
