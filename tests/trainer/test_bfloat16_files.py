"""Files of bfloat16 models: cutting, slicing, exporting and importing preserve the dtype and every bit."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.plain_model import read_checkpoint
from data_scoring.base.files import read_json
from data_scoring.corpus.corpus import Corpus
from flows.models.hugging_face_models import export_model, import_model
from flows.run.stored_model import find_model
from tests.conftest import TINY_MODEL
from tests.trainer.test_bfloat16 import open_plain
from tests.trainer.test_pruning import random_plan
from tests.trainer.two_ranks_bfloat16 import CUT, KEPT_TOKENS, ROUNDED, SLICED, STUDENT
from trainer.checkpoint_folder import list_checkpoints, read_checkpoint_record
from trainer.checkpoint_shapes import EMBEDDING, HEAD, shapes_of
from trainer.pruning import slice_checkpoint, whole_layers
from trainer.weights import write_weights


def are_in_bfloat16(tensors: dict[str, Tensor]) -> bool:
    return {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_a_smaller_vocabulary_has_the_rows_that_stay(left: Path) -> None:
    whole, cut = read_checkpoint(left / ROUNDED), read_checkpoint(left / CUT)
    assert are_in_bfloat16(cut) and whole.keys() == cut.keys()
    for name, tensor in cut.items():
        if name in (EMBEDDING, HEAD):
            assert torch.equal(tensor[: len(KEPT_TOKENS)], whole[name][list(KEPT_TOKENS)])
            assert not tensor[len(KEPT_TOKENS) :].any()
        else:
            assert torch.equal(tensor, whole[name]), name


def test_a_student_has_its_part_of_the_teacher(left: Path, tmp_path: Path) -> None:
    """To the last bit what is cut out of the same weights in float32."""
    sliced = read_checkpoint(left / SLICED)
    assert are_in_bfloat16(sliced)
    write_as(tmp_path / "single", read_checkpoint(left / ROUNDED), torch.float32)
    part = random_plan(TINY_MODEL, STUDENT, range(TINY_MODEL.num_layers), seed=7)
    slice_checkpoint(tmp_path / "single", TINY_MODEL, STUDENT, part, tmp_path / "sliced")
    expected = read_checkpoint(tmp_path / "sliced")
    assert expected.keys() == sliced.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(sliced[name].float(), tensor), name


def write_as(target: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    write_weights(
        target,
        {name: (tuple(tensor.shape), dtype) for name, tensor in tensors.items()},
        lambda name, layer: (tensors[name] if layer is None else tensors[name][layer]).to(dtype),
        {"step": 0, "vocab_size": 300},
    )


def test_additions_that_a_teacher_has_not_start_in_its_type(tmp_path: Path) -> None:
    teacher = TINY_MODEL.model_copy(update={"activation_terms": 1, "shortcut_reduction": None})
    weights = {name: torch.randn(shape) for name, shape in shapes_of(teacher, 384).items()}
    write_as(tmp_path / "teacher", weights, torch.bfloat16)
    slice_checkpoint(tmp_path / "teacher", teacher, TINY_MODEL, whole_layers(teacher, range(2)), tmp_path / "student")
    student = read_checkpoint(tmp_path / "student")
    assert are_in_bfloat16(student) and student.keys() == shapes_of(TINY_MODEL, 384).keys()
    scale = student["decoder.layers.mlp.activation_func.scale"]
    assert scale[:, 0].eq(1).all() and not scale[:, 1:].any()
    # What silu gives at the offsets sums up to nothing, but for rounding.
    offset = student["decoder.layers.mlp.activation_func.offset"].float()
    assert offset.abs().max() > 0.1
    assert torch.nn.functional.silu(offset).sum(dim=1).abs().max() < 2**-10
    assert student["decoder.layers.self_attn_bda.down"].float().std().item() == pytest.approx(0.02, rel=0.2)


@pytest.fixture
def model_folder(left: Path, tiny_corpus: Corpus, tmp_path: Path) -> Path:
    """A model folder of what was trained in bfloat16, with the optimizer's state."""
    [checkpoint] = list_checkpoints(left / "train-one" / "checkpoint")
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder / "checkpoint" / checkpoint.name)
    (folder / "model.yaml").write_text(yaml.safe_dump(TINY_MODEL.model_dump(mode="json")))
    shutil.copy(tiny_corpus.tokenizer_path, folder / "tokenizer.json")
    return folder


def test_a_trained_model_goes_to_hugging_face_and_back(
    model_folder: Path, tiny_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    export_model(model_folder, None, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert are_in_bfloat16(tensors)
    assert read_json(tmp_path / "out" / "config.json")["torch_dtype"] == "bfloat16"
    checkpoint = find_model(model_folder).checkpoint
    tokens = torch.from_numpy(tiny_corpus.read(np.zeros(8, int), np.arange(8)).tokens)[:, :-1]
    with torch.no_grad():
        exact = open_plain(checkpoint).logits(tokens)
        for dtype, rms in ((torch.float32, 1e-5), (torch.bfloat16, 2**-6)):
            opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype, trust_remote_code=True)
            assert opened.dtype == dtype
            assert 0 < (opened(tokens).logits.float() - exact).square().mean().sqrt() < rms
    import_model(tmp_path / "out", tmp_path / "in")
    back = find_model(tmp_path / "in").checkpoint
    before, after = read_checkpoint(checkpoint), read_checkpoint(back)
    assert are_in_bfloat16(after) and before.keys() == after.keys()
    for name, tensor in after.items():
        rows = 300 if name in (EMBEDDING, HEAD) else None
        assert torch.equal(tensor[:rows], before[name][:rows]), name
    assert read_checkpoint_record(back)["vocab_size"] == 300


def test_an_export_in_float32_is_the_same_to_the_last_bit(model_folder: Path, tmp_path: Path) -> None:
    export_model(model_folder, None, tmp_path / "kept")
    export_model(model_folder, None, tmp_path / "single", "float32")
    kept, single = (load_file(tmp_path / name / "model.safetensors") for name in ("kept", "single"))
    assert kept.keys() == single.keys()
    for name, tensor in single.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, kept[name].float()), name
