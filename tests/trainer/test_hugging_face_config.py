"""Imported models compared with transformers, under every layout."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_scoring.corpus.corpus import Corpus
from flows.run.stored_model import find_model
from tests.conftest import Ranks, read_rows
from tests.hugging_face_models import MODELS, TIED
from tests.trainer.two_ranks_hugging_face import LAYOUTS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_imported_models_give_the_logits_that_transformers_gives(layout: str, found: list[dict[str, Any]]) -> None:
    differences = [entry[f"hugging face {layout}"] for entry in found]
    # And our own additions, as transformers computes them by the modelling file.
    last_stages = [entry for entry in differences if "logits" in entry["llama"]]
    assert len(last_stages) == (1 if layout == "pipeline" else 2)
    for entry in last_stages:
        for name in (*MODELS, "pangu"):
            assert entry[name]["logits"] < 1e-4, name


def test_four_ranks_that_share_layers_and_stages_score_as_transformers_does(
    ranks: Ranks, hugging_face: Path, tiny_corpus: Corpus
) -> None:
    from transformers import AutoModelForCausalLM

    stored = find_model(hugging_face / "qwen2-imported")
    folder = ranks.score("qwen2-scored", stored.checkpoint, (2, 2, 1), stored.config)
    model = AutoModelForCausalLM.from_pretrained(hugging_face / "qwen2")
    rows = read_rows(folder / "losses" / "shard=0000.parquet", "sample", "num_tokens", "loss")
    assert len(rows) == tiny_corpus.num_samples(0) > 10
    for sample, num_tokens, loss in rows:
        tokens = torch.from_numpy(tiny_corpus.read(np.array([0]), np.array([sample])).tokens[:, : num_tokens + 1])
        with torch.no_grad():
            logits = model(tokens[:, :-1]).logits[0]
        expected = torch.nn.functional.cross_entropy(logits, tokens[0, 1:])
        assert loss == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("layout", ["tensor", "pipeline"])
def test_a_tied_embedding_gets_the_gradient_of_both_its_uses(layout: str, found: list[dict[str, Any]]) -> None:
    for name in TIED:
        entries = [entry[f"hugging face {layout}"][name] for entry in found]
        assert max(entry["gradient"] for entry in entries) < 1e-4, name
        assert max(entry["losses"] for entry in entries if "losses" in entry) < 1e-4, name
