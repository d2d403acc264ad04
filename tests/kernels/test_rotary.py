"""The rotation of queries and keys compared with Megatron's, and with its own definition in float64."""

import pytest
import torch
from torch import Tensor

from kernels.rotary import rotary_table, rotate

SEQ, BATCH, GROUPS, CHANNELS = 11, 2, 3, 6
DTYPES = (torch.float32, torch.bfloat16)


def make_angles() -> Tensor:
    return torch.outer(torch.arange(SEQ).float(), 100.0 ** -(torch.arange(0, CHANNELS, 2).float() / CHANNELS))


def rotate_as_megatron_does(qkv: Tensor, num_queries: int) -> tuple[Tensor, Tensor, Tensor]:
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    angles = make_angles().to(torch.promote_types(qkv.dtype, torch.float32)).repeat(1, 2)[:, None, None]
    heads = qkv.view(SEQ, BATCH, GROUPS, -1, CHANNELS)
    query, key = heads[..., :num_queries, :].flatten(2, 3), heads[..., num_queries, :]
    return _apply_rotary_pos_emb_bshd(query, angles), _apply_rotary_pos_emb_bshd(key, angles), heads[..., -1, :]


def rotate_here(qkv: Tensor, num_queries: int) -> tuple[Tensor, Tensor, Tensor]:
    return rotate(qkv, rotary_table(make_angles(), num_queries, qkv.dtype), CHANNELS)


def results(function: object, qkv: Tensor, num_queries: int, weights: list[Tensor]) -> list[Tensor]:
    """Return queries, keys, values, and the gradient of their weighted sum."""
    leaf = qkv.clone().requires_grad_()
    parts = function(leaf, num_queries)  # type: ignore[operator]
    (gradient,) = torch.autograd.grad(parts, leaf, [each.to(qkv.dtype) for each in weights])
    return [*(part.detach().double() for part in parts), gradient.double()]


@pytest.mark.parametrize("num_queries", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotation_errs_no_more_than_megatrons(dtype: torch.dtype, num_queries: int) -> None:
    torch.manual_seed(0)
    # Numbers that have the dtype's precision, so that they are the same in float64.
    qkv = torch.randn(SEQ, BATCH, GROUPS, (num_queries + 2) * CHANNELS).to(dtype)
    shapes = [(SEQ, BATCH, heads, CHANNELS) for heads in (GROUPS * num_queries, GROUPS, GROUPS)]
    weights = [torch.randn(shape).to(dtype) for shape in shapes]
    truth = results(rotate_as_megatron_does, qkv.double(), num_queries, weights)
    megatrons = results(rotate_as_megatron_does, qkv, num_queries, weights)
    ours = results(rotate_here, qkv, num_queries, weights)
    for exact, reference, found in zip(truth, megatrons, ours, strict=True):
        error, allowed = (found - exact).square().mean().sqrt(), (reference - exact).square().mean().sqrt()
        assert error <= 1.01 * allowed + 1e-12
    assert (
        truth[0][1:] - qkv.double().view(SEQ, BATCH, GROUPS, -1, CHANNELS)[1:, :, :, :-2].flatten(2, 3)
    ).abs().max() > 1


def test_positions_may_be_chosen_from_the_table() -> None:
    """As prefix trees do, whose nodes have their depths' positions."""
    qkv = torch.randn(SEQ, BATCH, GROUPS, 3 * CHANNELS)
    order = torch.randperm(SEQ)
    table = rotary_table(make_angles(), 1, torch.float32)
    for whole, chosen in zip(rotate(qkv, table, CHANNELS), rotate(qkv[order], table[order], CHANNELS), strict=True):
        torch.testing.assert_close(chosen, whole[order], rtol=0, atol=0)
