"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) of queries and keys in one pass, in plain torch.

Shapes: s positions, b samples, g query groups, q query heads per group, d channels per head. The channels c and c + d/2
of a head are rotated as a pair, as in Megatron-Core and Hugging Face's LLaMA.
"""

from typing import Any

import torch
from torch import Tensor


def rotary_table(angles_sc: Tensor, num_queries: int, dtype: torch.dtype) -> Tensor:
    """Return the table that `rotate` takes, [s, 3, (q + 2) d]: cosines, and sines for both halves of each head.

    angles_sc: [s, d/2] float32, radians; num_queries: q. The factors of a group's queries and key are those of its
    positions; of its value, 1 and 0.
    """
    cos, sin = angles_sc.cos().to(dtype), angles_sc.sin().to(dtype)
    one, zero = torch.ones_like(cos), torch.zeros_like(cos)
    heads = num_queries + 1
    rows = ([cos, cos] * heads + [one, one], [zero, sin] * heads + [zero, zero], [-sin, zero] * heads + [zero, zero])
    return torch.stack([torch.cat(row, dim=1) for row in rows], dim=1)


def rotate(qkv: Tensor, table: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rotated queries, [s, b, g q, d], the rotated keys and the values, [s, b, g, d] each; differentiable.

    qkv: [s, b, g, (q + 2) d], contiguous: the queries, the key and the value of each group; table: [s, 3, (q + 2) d],
    of the same dtype, without gradient. The results are parts of one new tensor, so that nothing holds `qkv` any more;
    the backward pass needs only the table.
    """
    query, key, value = _Rotate.apply(qkv, table, channels)  # type: ignore[no-untyped-call]
    return query, key, value


class _Rotate(torch.autograd.Function):
    """The rotation, whose gradient is the rotation by the negative angles."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, table: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(table)
        ctx.channels = channels
        heads = _rotate(qkv, table, channels, 1).view(*qkv.shape[:3], -1, channels)
        return heads[..., :-2, :].flatten(2, 3), heads[..., -2, :], heads[..., -1, :]

    @staticmethod
    def backward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None, None]:
        (table,) = ctx.saved_tensors
        queries = query.reshape(*key.shape[:3], -1, ctx.channels)
        gradient = torch.cat([queries, key[..., None, :], value[..., None, :]], dim=3)
        return _rotate(gradient.flatten(3), table, ctx.channels, -1), None, None


def _rotate(qkv: Tensor, table: Tensor, channels: int, sign: int) -> Tensor:
    """Return `qkv` with queries and keys rotated by the angles times `sign`.

    A group's heads are treated as one long row, in which the partner of a channel is d/2 to the left or to the right,
    and factors are 0 where it is not: the passes run over long contiguous rows, which on a CPU is several times as
    fast as over halves of heads.
    """
    half, end = channels // 2, qkv.shape[-1] - channels
    cos, left, right = table[:, None, None].unbind(3)
    out = qkv * cos
    out[..., half:end].addcmul_(qkv[..., : end - half], left[..., half:end], value=sign)
    out[..., : end - half].addcmul_(qkv[..., half:end], right[..., : end - half], value=sign)
    return out
