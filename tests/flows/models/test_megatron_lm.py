"""Exports for Megatron-LM: its layout, the same weights, and the same logits by its own code."""

import os
import subprocess
import sys
from pathlib import Path

import megatron.core  # noqa: F401  # lets torch load the arguments in common.pt, as Megatron-LM does
import numpy as np
import pytest
import torch

from flows.cli.main import main
from flows.models.megatron_lm import export_megatron
from flows.run.stored_model import find_model
from tests.hugging_face_models import MODELS, ROWS
from trainer.weights import Weights


@pytest.mark.parametrize("name", [*MODELS, "pangu"])
def test_an_export_has_the_layout_the_arguments_and_the_weights(name: str, hugging_face: Path, tmp_path: Path) -> None:
    place = hugging_face / f"{name}-imported"
    made = export_megatron(place, None, tmp_path / "out")
    assert {path.name for path in made.folder.iterdir()} == {
        "iter_0000000",
        "latest_checkpointed_iteration.txt",
        "tokenizer",
    }
    assert (made.folder / "latest_checkpointed_iteration.txt").read_text() == "0"
    common = torch.load(made.folder / "iter_0000000" / "common.pt", weights_only=True)
    arguments = vars(common["args"])
    model = find_model(place).config
    assert (common["iteration"], common["checkpoint_version"]) == (0, 3.0)
    assert (arguments["num_layers"], arguments["hidden_size"], arguments["padded_vocab_size"]) == (2, 32, 384)
    assert arguments["untie_embeddings_and_output_weights"] != model.tied_embeddings
    assert bool(made.notes) == (name == "pangu")
    before, after = Weights(find_model(place).checkpoint), Weights(made.folder / "iter_0000000")
    assert after.shapes == before.shapes
    for tensor in before.shapes:
        assert torch.equal(before.read(tensor), after.read(tensor)), tensor


def test_weights_are_rounded_on_request(hugging_face: Path, tmp_path: Path) -> None:
    made = export_megatron(hugging_face / "llama-imported", None, tmp_path / "out", "bfloat16")
    before = Weights(find_model(hugging_face / "llama-imported").checkpoint)
    after = Weights(made.folder / "iter_0000000")
    assert set(after.dtypes.values()) == {torch.bfloat16}
    for tensor in before.shapes:
        assert torch.equal(before.read(tensor).bfloat16(), after.read(tensor)), tensor


def test_the_command_says_how_to_load_it_and_leaves_what_is_there(
    hugging_face: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", "megatron", str(hugging_face / "llama-tied-imported"), "--output", str(tmp_path / "a b")]
    assert main(command) == 0
    options = "--use-checkpoint-args --finetune --norm-epsilon 1e-06 --use-rope-scaling --rope-scaling-factor 8.0"
    assert f"--load '{tmp_path}/a b' {options} --tokenizer-type" in capsys.readouterr().out
    assert main(command) == 1
    assert "already exists" in capsys.readouterr().err
    assert main(["export", "megatron", str(tmp_path)]) == 1
    assert "has no model" in capsys.readouterr().err


@pytest.mark.skipif("MEGATRON_LM" not in os.environ, reason="MEGATRON_LM does not name a checkout of Megatron-LM")
@pytest.mark.parametrize("name", MODELS)
def test_megatron_lm_computes_the_same_logits(name: str, hugging_face: Path, tmp_path: Path) -> None:
    made = export_megatron(hugging_face / f"{name}-imported", None, tmp_path / "out", "float32")
    known = torch.load(hugging_face / f"{name}.pt")
    np.save(tmp_path / "tokens.npy", known["tokens"][:, :-1].numpy())
    program = [sys.executable, "-m", "tests.flows.models.megatron_lm_logits"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.environ["MEGATRON_LM"], *sys.path])}
    files = [tmp_path / "tokens.npy", tmp_path / "logits.npy"]
    subprocess.run([*program, *files, *made.options.split()], env=environment, check=True)
    found = torch.from_numpy(np.load(tmp_path / "logits.npy"))[..., :ROWS]
    torch.testing.assert_close(found, known["logits"], rtol=1e-4, atol=1e-5)
