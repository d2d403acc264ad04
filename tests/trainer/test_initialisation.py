"""Standard deviations of initial weights, compared with their closed forms."""

import math
from typing import Any

import pytest
import torch

from tests.trainer.two_ranks import SMALL

STD = SMALL.init_std
PROJECTIONS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")


def expected_std(init: str, name: str) -> float:
    if not name.endswith(PROJECTIONS) or init == "constant":
        return STD
    layer = int(name.split(".")[2]) + 1
    return STD / math.sqrt(2 * (SMALL.num_layers if init == "gpt2" else layer))


@pytest.mark.parametrize("init", ["constant", "gpt2", "internlm"])
def test_standard_deviations_are_those_of_the_scheme(init: str, found: list[dict[str, Any]]) -> None:
    drawn = 0
    for name, weight in found[0]["weights"][init].items():
        if name.endswith("self_attn_bda.up"):
            assert not weight.any()
        elif "layernorm" in name:
            assert (weight == 1).all()
        elif "activation_func" not in name:
            # Five standard errors of a sample's standard deviation.
            bound = 5 / math.sqrt(2 * weight.numel())
            assert weight.std() == pytest.approx(expected_std(init, name), rel=bound), name
            drawn += 1
    assert drawn == 2 + 5 * SMALL.num_layers


def test_schemes_differ_in_the_projections_alone(found: list[dict[str, Any]]) -> None:
    """Each scheme scales the same draws; that ranks which share a model hold parts of them, the ranks have checked."""
    weights = found[0]["weights"]
    for name, constant in weights["constant"].items():
        for init in ("gpt2", "internlm"):
            factor = expected_std(init, name) / STD
            torch.testing.assert_close(weights[init][name], constant * factor, atol=1e-7, rtol=1e-5)
