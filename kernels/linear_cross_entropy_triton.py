"""Linear cross-entropy in Triton: logits stay in registers, one tile at a time.

After Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models". The programs of the forward pass, one
per multiprocessor, take tiles of tokens and vocabulary in turn and write each tile's statistics, which a second step
combines in a fixed order. The backward pass writes chunks of the logits' gradients, from which torch's matrix products
compute those of the inputs. From Hopper on, the tensor memory accelerator loads the tiles. Run so far only in Triton's
interpreter.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.linear_cross_entropy_chunked import TRITON_CHUNK, accumulate_gradients

# Tiles that are computed at the same time read few different rows of both matrices, which the second-level cache holds:
# those of this many blocks of tokens.
_GROUP = 16
# The least compute capability, times ten, whose devices load tiles by descriptor.
_DESCRIPTORS_FROM = 90
# What the interpreter takes the place of.
_INTERPRETED = (90, 4)


class _Tile(NamedTuple):
    """The tile of one program: tokens, rows and channels, and how many warps and loads in flight it takes."""

    block_n: int
    block_v: int
    block_h: int
    num_warps: int
    num_stages: int


# By the least compute capability, times ten. Tiles as large as the registers hold without spilling any.
_TILES = {80: _Tile(128, 128, 64, 8, 3), 90: _Tile(128, 256, 64, 8, 4), 100: _Tile(128, 128, 64, 8, 4)}
# In single precision, which tensor cores would round.
_SINGLE_TILE = _Tile(64, 64, 32, 8, 3)


@triton.jit
def _place(tile, num_blocks, num_columns, GROUP: tl.constexpr):
    """Return the block of tokens and the column of a tile: within groups of blocks, column by column."""
    tiles_a_group = GROUP * num_columns
    first = tile // tiles_a_group * GROUP
    size = tl.minimum(num_blocks - first, GROUP)
    return first + tile % tiles_a_group % size, tile % tiles_a_group // size


@triton.jit
def _logits_tile(
    hidden, weight, first_token, first_row, num_tokens, num_rows, width,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
    HAS_DESCRIPTORS: tl.constexpr, IS_EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the logits of a tile, [tokens, rows] float32; of any value beyond the last token or row."""
    logits = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    if HAS_DESCRIPTORS:
        for start in range(0, width, BLOCK_H):
            a = hidden.load([first_token, start])
            b = weight.load([first_row, start])
            logits = tl.dot(a, b.T, logits, input_precision=PRECISION)
    else:
        channels = tl.arange(0, BLOCK_H)
        tokens = tl.minimum(first_token + tl.arange(0, BLOCK_N), num_tokens - 1)
        rows = tl.minimum(first_row + tl.arange(0, BLOCK_V), num_rows - 1)
        hidden_at = hidden + tokens[:, None].to(tl.int64) * width + channels[None, :]
        weight_at = weight + rows[None, :].to(tl.int64) * width + channels[:, None]
        for start in range(0, width, BLOCK_H):
            if IS_EVEN:
                a, b = tl.load(hidden_at + start), tl.load(weight_at + start)
            else:
                is_inside = start + channels < width
                a = tl.load(hidden_at + start, mask=is_inside[None, :], other=0.0)
                b = tl.load(weight_at + start, mask=is_inside[:, None], other=0.0)
            logits = tl.dot(a, b, logits, input_precision=PRECISION)
    return logits


@triton.jit
def _statistics(
    hidden, weight, labels, maxima, sums, targets, num_tokens, num_rows, width,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr,
    HAS_DESCRIPTORS: tl.constexpr, IS_EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    num_blocks, num_columns = tl.cdiv(num_tokens, BLOCK_N), tl.cdiv(num_rows, BLOCK_V)
    for tile in tl.range(tl.program_id(0), num_blocks * num_columns, tl.num_programs(0)):
        block, column = _place(tile, num_blocks, num_columns, GROUP)
        first_token, first_row = block * BLOCK_N, column * BLOCK_V
        logits = _logits_tile(
            hidden, weight, first_token, first_row, num_tokens, num_rows, width,
            BLOCK_N, BLOCK_V, BLOCK_H, HAS_DESCRIPTORS, IS_EVEN, PRECISION,
        )  # fmt: skip
        tokens, rows = first_token + tl.arange(0, BLOCK_N), first_row + tl.arange(0, BLOCK_V)
        is_token = tokens < num_tokens
        logits = tl.where((rows < num_rows)[None, :], logits, float("-inf"))
        label = tl.load(labels + tokens, mask=is_token, other=-1)
        maximum = tl.max(logits, axis=1)
        target = tl.sum(tl.where(rows[None, :] == label[:, None], logits, 0.0), axis=1)
        total = tl.sum(tl.exp(logits - maximum[:, None]), axis=1)
        place = column.to(tl.int64) * num_tokens + tokens
        tl.store(maxima + place, maximum, mask=is_token)
        tl.store(sums + place, total, mask=is_token)
        # The tile that has the label's row writes its logit.
        is_here = (label >= first_row) & (label < first_row + BLOCK_V) & (label < num_rows)
        tl.store(targets + tokens, target, mask=is_token & is_here)


@triton.jit
def _logit_gradients(
    hidden, weight, labels, log_sums, grads, out, num_tokens, num_rows, total_rows, width,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr,
    HAS_DESCRIPTORS: tl.constexpr, IS_EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    num_blocks, num_columns = tl.cdiv(num_tokens, BLOCK_N), tl.cdiv(total_rows, BLOCK_V)
    for tile in tl.range(tl.program_id(0), num_blocks * num_columns, tl.num_programs(0)):
        block, column = _place(tile, num_blocks, num_columns, GROUP)
        first_token, first_row = block * BLOCK_N, column * BLOCK_V
        logits = _logits_tile(
            hidden, weight, first_token, first_row, num_tokens, total_rows, width,
            BLOCK_N, BLOCK_V, BLOCK_H, HAS_DESCRIPTORS, IS_EVEN, PRECISION,
        )  # fmt: skip
        tokens, rows = first_token + tl.arange(0, BLOCK_N), first_row + tl.arange(0, BLOCK_V)
        is_token = tokens < num_tokens
        label = tl.load(labels + tokens, mask=is_token, other=-1)
        log_sum = tl.load(log_sums + tokens, mask=is_token, other=0.0)
        grad = tl.load(grads + tokens, mask=is_token, other=0.0)
        is_label = (rows[None, :] == label[:, None]).to(tl.float32)
        values = (tl.exp(logits - log_sum[:, None]) - is_label) * grad[:, None]
        # Padding's logits may be of any size; masking the values takes fewer registers than masking these.
        values = tl.where((rows < num_rows)[None, :], values, 0.0)
        place = tokens[:, None].to(tl.int64) * total_rows + rows[None, :]
        tl.store(out + place, values.to(out.dtype.element_ty), mask=is_token[:, None] & (rows < total_rows)[None, :])


def statistics(hidden_nh: Tensor, weight_vh: Tensor, labels_n: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return each token's greatest logit, sum of exponentials relative to it and label's logit, [n] float32 each.

    Takes the arguments of `kernels.linear_cross_entropy_chunked.statistics`.
    """
    hidden_nh, weight_vh, labels_n = hidden_nh.contiguous(), weight_vh.contiguous(), labels_n.contiguous()
    num_tokens, launch = len(hidden_nh), _Launch(hidden_nh, weight_vh)
    targets_n = torch.zeros(num_tokens, device=hidden_nh.device)
    if not num_rows:
        return torch.full_like(targets_n, -torch.inf), torch.zeros_like(targets_n), targets_n
    columns = triton.cdiv(num_rows, launch.tile.block_v)
    maxima_cn, sums_cn = torch.empty(2, columns, num_tokens, device=hidden_nh.device)
    _statistics[launch.grid(num_rows)](
        *launch.inputs, labels_n, maxima_cn, sums_cn, targets_n, num_tokens, num_rows, hidden_nh.shape[1],
        **launch.options,
    )  # fmt: skip
    maximum_n = maxima_cn.amax(dim=0)
    return maximum_n, maxima_cn.sub_(maximum_n).exp_().mul_(sums_cn).sum(dim=0), targets_n


def gradients(
    hidden_nh: Tensor,
    weight_vh: Tensor,
    labels_n: Tensor,
    log_sum_n: Tensor,
    grad_n: Tensor,
    num_rows: int,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients as `kernels.linear_cross_entropy_chunked.gradients` does."""
    return accumulate_gradients(
        _write_logit_gradients,
        TRITON_CHUNK,
        hidden_nh.contiguous(),
        weight_vh.contiguous(),
        labels_n,
        log_sum_n,
        grad_n.contiguous(),
        num_rows,
        needs_hidden,
        needs_weight,
    )


def _write_logit_gradients(
    hidden_nh: Tensor, weight_vh: Tensor, labels_n: Tensor, log_sum_n: Tensor, grad_n: Tensor, num_rows: int,
    out_nv: Tensor,
) -> None:  # fmt: skip
    num_tokens, total_rows = out_nv.shape
    launch = _Launch(hidden_nh, weight_vh)
    _logit_gradients[launch.grid(total_rows)](
        *launch.inputs, labels_n, log_sum_n, grad_n, out_nv, num_tokens, num_rows, total_rows, hidden_nh.shape[1],
        **launch.options,
    )  # fmt: skip


class _Launch:
    """How a kernel is launched for hidden states and a weight, both contiguous, on the current device."""

    def __init__(self, hidden_nh: Tensor, weight_vh: Tensor) -> None:
        capability, self._num_processors = _describe_device()
        self._num_tokens, width = hidden_nh.shape
        # Descriptors need rows at multiples of 16 bytes.
        is_aligned = all(each.data_ptr() % 16 == 0 for each in (hidden_nh, weight_vh))
        has_descriptors = capability >= _DESCRIPTORS_FROM and width * hidden_nh.element_size() % 16 == 0 and is_aligned
        # Without descriptors, addresses take registers, too.
        self.tile = _find_tile(hidden_nh.dtype, capability if has_descriptors else min(_TILES))
        self.inputs: tuple[Any, Any] = (hidden_nh, weight_vh)
        if has_descriptors:
            blocks = (self.tile.block_n, self.tile.block_v)
            self.inputs = tuple(
                TensorDescriptor.from_tensor(each, [rows, self.tile.block_h])
                for each, rows in zip(self.inputs, blocks, strict=True)
            )
        self.options = {
            "BLOCK_N": self.tile.block_n, "BLOCK_V": self.tile.block_v, "BLOCK_H": self.tile.block_h, "GROUP": _GROUP,
            "HAS_DESCRIPTORS": has_descriptors, "IS_EVEN": width % self.tile.block_h == 0,
            # Full float32 precision instead of TF32.
            "PRECISION": "ieee", "num_warps": self.tile.num_warps, "num_stages": self.tile.num_stages,
        }  # fmt: skip

    def grid(self, num_rows: int) -> tuple[int]:
        """Return the number of programs: one per multiprocessor, and no more than there are tiles."""
        tiles = triton.cdiv(self._num_tokens, self.tile.block_n) * triton.cdiv(num_rows, self.tile.block_v)
        return (min(self._num_processors, tiles),)


def _find_tile(dtype: torch.dtype, capability: int) -> _Tile:
    if dtype == torch.float32:
        return _SINGLE_TILE
    return _TILES[max(each for each in _TILES if each <= max(capability, min(_TILES)))]


def _describe_device() -> tuple[int, int]:
    """Return the current device's compute capability, times ten, and its number of multiprocessors."""
    if triton.knobs.runtime.interpret:
        return _INTERPRETED
    driver = triton.runtime.driver.active
    properties = driver.utils.get_device_properties(driver.get_current_device())
    return driver.get_current_target().arch, properties["multiprocessor_count"]
