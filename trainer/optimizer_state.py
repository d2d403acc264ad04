"""Optimizer state in a checkpoint: float32 weights and two moments per parameter, unsharded, in its shape.

Megatron's distributed optimizer splits a flat buffer of all parameters into equal shards, one per data-parallel rank,
regardless of parameter boundaries. On saving, a parameter is owned by the rank that has the largest piece of it, and
only parameters that cross a shard boundary are sent. On loading, a rank reads the parameters of which it has a piece.
Either way, a host never holds more than its ranks' shards, and the files do not depend on the layout: keys and shapes
are those of Megatron's format "fully_reshardable", which gathers everything on every rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from torch import Tensor

_STATES = ("param", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Placed:
    """A parameter, its index in the buffers, and the data-parallel ranks that have a piece of it.

    pieces: rank to the piece's start and end (exclusive), counted within the parameter.
    """

    number: int
    parameter: torch.nn.Parameter
    pieces: dict[int, tuple[int, int]]

    @property
    def owner(self) -> int:
        """Return the rank with the largest piece, the first of equals."""
        return max(self.pieces, key=lambda rank: (self.pieces[rank][1] - self.pieces[rank][0], -rank))


def owned_states(optimizer: Any, weights: ShardedStateDict) -> ShardedStateDict:
    """Return the sharded state dict of the states of the parameters that this data-parallel rank owns.

    optimizer: Megatron's distributed optimizer; weights: the sharded state dicts of its model's chunks. The result maps
    the parameter's index to "param", "exp_avg" and "exp_avg_sq", float32, in the parameter's shape. All data-parallel
    ranks must call this together.
    """
    group = optimizer.data_parallel_group
    described, states = _by_parameter(weights), {}
    for placed in _place(optimizer):
        weight = described[placed.parameter]
        # A replica on another tensor-parallel rank or pipeline stage is written instead.
        if any(weight.replica_id[:2]):
            continue
        local = _local_states(optimizer, placed) if group.rank() in placed.pieces else {}
        whole = {name: _gather(placed, local.get(name), weight.data, group) for name in _STATES}
        states[placed.number] = {
            name: _describe(weight, name, tensor) for name, tensor in whole.items() if tensor is not None
        }
    return states


def needed_states(optimizer: Any, weights: ShardedStateDict) -> ShardedStateDict:
    """Return the sharded state dict to load, in host memory, of the parameters of which this rank has a piece."""
    rank, described, states = optimizer.data_parallel_group.rank(), _by_parameter(weights), {}
    for placed in _place(optimizer):
        if rank in placed.pieces:
            weight = described[placed.parameter]
            states[placed.number] = {
                name: _describe(weight, name, torch.empty(weight.data.shape, dtype=torch.float32)) for name in _STATES
            }
    return states


@torch.no_grad()
def load_states(optimizer: Any, loaded: dict[int, dict[str, Tensor]]) -> None:
    """Copy this rank's pieces of the states loaded for `needed_states` into the optimizer."""
    rank = optimizer.data_parallel_group.rank()
    for placed in _place(optimizer):
        if rank in placed.pieces:
            start, end = placed.pieces[rank]
            for name, state in _local_states(optimizer, placed).items():
                state.copy_(loaded[placed.number][name].flatten()[start:end])


def _place(optimizer: Any) -> Iterator[_Placed]:
    """Yield all parameters of the optimizer, in the same order on every rank of its data-parallel group."""
    ranks, number = optimizer.data_parallel_group.size(), 0
    for buffer in optimizer.buffers:
        for parameter, (start, end, bucket_id) in buffer.param_index_map.items():
            bucket = buffer.buckets[bucket_id]
            share = bucket.grad_data.numel() // ranks
            first, last = (start - bucket.offset) // share, (end - 1 - bucket.offset) // share
            pieces = {}
            for rank in range(first, last + 1):
                share_start = bucket.offset + rank * share
                pieces[rank] = (max(start, share_start) - start, min(end, share_start + share) - start)
            yield _Placed(number, parameter, pieces)
            number += 1


def _local_states(optimizer: Any, placed: _Placed) -> dict[str, Tensor]:
    """Return this rank's piece of a parameter's states, flat; views of the optimizer's tensors."""
    states = optimizer._get_main_param_and_optimizer_states(placed.parameter)
    return {name: states[name].detach() for name in _STATES}


def _gather(placed: _Placed, local: Tensor | None, weight: Tensor, group: Any) -> Tensor | None:
    """Return a state of a parameter, in its shape, on the rank that owns it; None on others.

    local: this rank's piece; weight: the parameter.
    """
    rank, owner = group.rank(), placed.owner
    if local is None or placed.pieces.keys() == {rank}:
        return None if local is None else local.view(weight.shape)
    ranks = torch.distributed.get_process_group_ranks(group)
    if rank != owner:
        torch.distributed.send(local.contiguous(), ranks[owner], group)
        return None
    # Gathered in host memory: an embedding's states would take a gigabyte on the device.
    whole = torch.empty(weight.numel(), dtype=torch.float32)
    for other, (start, end) in placed.pieces.items():
        piece = local
        if other != rank:
            piece = local.new_empty(end - start)
            torch.distributed.recv(piece, ranks[other], group)
        whole[start:end].copy_(piece)
    return whole.view(weight.shape)


def _by_parameter(weights: ShardedStateDict) -> dict[torch.nn.Parameter, Any]:
    """Return each parameter's entry in the sharded state dicts of the model's chunks."""
    described, _ = extract_sharded_tensors_and_factories(weights)
    return {sharded.data: sharded for sharded in nested_values(described)}


def _describe(weight: Any, name: str, state: Tensor) -> Any:
    """Return the sharded entry of a state, derived from that of its parameter, written by the rank that has it."""
    changes: dict[str, Any] = {
        "key": f"optimizer.state.{name}.{weight.key}",
        "data": state,
        "replica_id": (*weight.replica_id[:2], 0),
    }
    # Factories, which split a parameter such as gate and up, have no dtype; their parts are made later.
    if hasattr(weight, "dtype"):
        changes["dtype"] = state.dtype
    sharded = replace(weight, **changes)
    sharded.validate_metadata_integrity()
    return sharded
