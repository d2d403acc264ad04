"""Imported models against transformers, under every layout."""

from typing import Any

import pytest

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


@pytest.mark.parametrize("layout", ["tensor", "pipeline"])
def test_a_tied_embedding_gets_the_gradient_of_both_its_uses(layout: str, found: list[dict[str, Any]]) -> None:
    for name in TIED:
        entries = [entry[f"hugging face {layout}"][name] for entry in found]
        assert max(entry["gradient"] for entry in entries) < 1e-4, name
        assert max(entry["losses"] for entry in entries if "losses" in entry) < 1e-4, name
