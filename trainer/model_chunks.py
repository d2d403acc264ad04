"""This rank's part of the model: chunks of consecutive layers. And passes through the chunks of all pipeline stages.

With `parallel.virtual_pipeline`, the first chunk of every stage precedes the second one of any: chunk c of stage s is
number c * pipeline + s in the order of the layers.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from torch import Tensor


class ModelChunks(torch.nn.ModuleList):
    """This rank's chunks of the model, in the order of the layers; a single one without virtual pipeline stages.

    A chunk is a `trainer.model.Decoder`, perhaps in Megatron's wrappers for bfloat16 and for data parallelism.
    """

    def __iter__(self) -> Iterator[Any]:
        """Return an iterator over the chunks."""
        return iter(self._modules.values())

    @property
    def config(self) -> Any:
        """Return Megatron's configuration, which all chunks share."""
        return self[0].config

    @property
    def decoders(self) -> list[Any]:
        """Return the chunks without wrappers."""
        return [unwrap_model(chunk) for chunk in self]

    @property
    def layers(self) -> list[Any]:
        """Return the layers of all chunks; their `layer_number` counts those of the whole model from 1."""
        return [layer for decoder in self.decoders for layer in decoder.decoder.layers]

    @property
    def max_sequence_length(self) -> int:
        """Return the most tokens that the model takes at once."""
        return int(self.decoders[0].max_sequence_length)

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return next(self.parameters()).device

    def zero_grad_buffer(self) -> None:
        """Set all gradients to zero, before a step. The chunks must be wrapped for data parallelism."""
        for chunk in self:
            chunk.zero_grad_buffer()


def pass_through(
    model: ModelChunks,
    shape: Callable[[Any], tuple[int, ...]],
    compute: Callable[[Any, Tensor | None], Tensor],
) -> Tensor | None:
    """Return what `compute` returns for the model's last chunk, on the rank that has it; None on others.

    A forward pass of one microbatch, from chunk to chunk and from rank to rank. compute: takes a chunk's decoder and
    what it has returned for the chunk before, or None for the first. shape: takes a chunk's decoder and returns the
    shape of what it receives, in `pipeline_dtype`.
    """
    stages = parallel_state.get_pipeline_model_parallel_group()
    for decoder in model.decoders:
        received = None
        if not decoder.pre_process:
            received = torch.empty(shape(decoder), dtype=model.config.pipeline_dtype, device=model.device)
            torch.distributed.recv(received, parallel_state.get_pipeline_model_parallel_prev_rank(), stages)
        output = compute(decoder, received)
        if decoder.post_process:
            return output
        torch.distributed.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank(), stages)
    return None
