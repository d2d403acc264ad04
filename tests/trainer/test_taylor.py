"""|weight · gradient| against plain torch's autograd, and under every layout alike."""

from typing import Any

import pytest
import torch

from benchmarks.plain_model import PlainModel, load_megatron_weights
from tests.trainer.test_masks import JOB_LAYOUTS
from tests.trainer.two_ranks_masks import GROUPED, TEACHERS

Found = list[dict[str, Any]]


@pytest.mark.parametrize("layout", JOB_LAYOUTS)
def test_values_are_weights_times_gradients_of_plain_torch(layout: str, found: Found) -> None:
    plain, values = found[0]["masks"]["plain"], found[0]["masks"][f"grouped {layout}"]["taylor"]
    model = PlainModel(GROUPED, len(plain["head.weight"]))
    # The values go the way of the weights.
    load_megatron_weights(model, values)
    for name, parameter in model.named_parameters():
        expected = (plain[name] * plain[f"{name}.grad"]).abs()
        assert expected.max() > 1e-6, name
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-4 * float(expected.max()), rtol=0)


@pytest.mark.parametrize("layout", JOB_LAYOUTS)
def test_no_layout_changes_the_values(layout: str, found: Found) -> None:
    """Of a model whose embedding is the head too, on two stages each with a copy, and of biases."""
    values, expected = (found[0]["masks"][f"biased {each}"]["taylor"] for each in (layout, "data"))
    assert "output_layer.weight" not in values
    assert values.keys() == expected.keys()
    for name, value in values.items():
        assert expected[name].max() > 0
        torch.testing.assert_close(value, expected[name], atol=1e-4 * float(expected[name].max()), rtol=0, msg=name)
    assert set(TEACHERS) == {"grouped", "biased"}
