"""PanGu-π's additions: initial values, gradients, and independence of the layout."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

Found = list[dict[str, Any]]


def test_a_model_with_additions_starts_out_as_the_one_without(found: Found) -> None:
    plain, two_terms, four_terms = found[0]["starts"]
    assert plain.std() > 0.1
    assert torch.equal(two_terms, plain)
    # Two of four terms start from offsets whose activations sum up to zero, but for rounding.
    torch.testing.assert_close(four_terms, plain, atol=1e-6, rtol=1e-5)


def test_losses_and_all_gradients_equal_plain_torch(found: Found) -> None:
    for differences in found[0]["plain"]:
        assert {"loss", "layers.0.scale", "layers.2.offset", "layers.1.shortcut_down.weight"} <= differences.keys()
        assert max(differences.values()) < 1e-4, differences


@pytest.mark.parametrize("rank", [0, 1])
def test_losses_and_all_gradients_are_those_of_one_rank(rank: int, found: Found) -> None:
    """Scales by channel and by layer, with and without sequence parallelism."""
    assert len(found[rank]["agreement"]) == 4
    for differences in found[rank]["agreement"]:
        assert "decoder.layers.1.mlp.activation_func.scale" in differences
        assert max(differences.values()) < 1e-4, differences


def test_scales_offsets_and_norms_do_not_decay(found: Found) -> None:
    for name, factor in found[0]["decayed"].items():
        expected = 1.0 if "activation_func" in name or "layernorm" in name else 1 - 0.5 * 0.2
        assert factor == pytest.approx(expected, abs=1e-6), name


def test_batches_cut_to_an_odd_length_are_shared_by_two_ranks(found: Found) -> None:
    alone, shared = found[0]["cut alone"], found[0]["cut together"]
    assert alone.shape == (7, 1)
    np.testing.assert_allclose(shared, alone, atol=1e-4)


@pytest.mark.parametrize("terms", range(1, 9))
def test_initial_offsets_sum_up_to_nothing_and_differ(terms: int, found: Found) -> None:
    offsets = torch.tensor(found[0]["offsets"][terms], dtype=torch.float64)
    assert len(offsets) == terms
    assert offsets[0] == 0
    values = F.silu(offsets)
    assert float(values.sum()) == pytest.approx(0, abs=1e-12)
    assert values.abs().max() <= 0.1 + 1e-12
    # The first term has a scale of its own.
    assert len(set(offsets[1:].tolist())) == terms - 1
