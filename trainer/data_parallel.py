"""Data parallelism: Megatron's wrapper, which may exchange gradients and weights while the model computes."""

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.utils import unwrap_model

from trainer.devices import free_cached_memory, overlaps_communication
from trainer.gradients import finalize_gradients
from trainer.model_chunks import ModelChunks


def wrap(model: ModelChunks, bf16: bool, is_sharded: bool) -> ModelChunks:
    """Return `model` wrapped for data parallelism: gradients are reduce-scattered if `is_sharded`, else all-reduced.

    If they are reduce-scattered, between replicas on devices that compute meanwhile, each bucket of gradients is
    reduced while the backward pass goes on, and each bucket of weights is gathered while the next forward pass begins.
    """
    replicas = int(parallel_state.get_data_parallel_world_size())
    is_overlapped = is_sharded and replicas > 1 and overlaps_communication(model.device.type)
    config = DistributedDataParallelConfig(
        use_distributed_optimizer=is_sharded,
        grad_reduce_in_fp32=bf16,
        overlap_grad_reduce=is_overlapped,
        overlap_param_gather=is_overlapped,
    )
    model.config.finalize_model_grads_func = finalize_gradients
    # Gradients of the first chunk are reduced last, when nothing but its own layers is left to compute: only it needs
    # buckets.
    wrapped = ModelChunks(
        DistributedDataParallel(model.config, config, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(model)
    )
    if is_overlapped:
        # Gradients are reduced in the last microbatch only.
        model.config.no_sync_func = partial(_no_sync, wrapped)
        for chunk in wrapped:
            _gather_head(chunk)
    return wrapped


@contextmanager
def _no_sync(wrapped: ModelChunks) -> Iterator[None]:
    with ExitStack() as stack:
        for chunk in wrapped:
            stack.enter_context(chunk.no_sync())
        yield


def gather_weights(wrapped: ModelChunks) -> None:
    """Wait until this rank has the weights that the last step has updated on other replicas.

    A forward pass of training gathers them itself. Every rank must call this before anything else uses the weights.
    """
    for chunk in wrapped:
        if chunk.ddp_config.overlap_param_gather:
            for group in chunk.bucket_groups:
                group.finish_param_sync(skip_next_bucket_dispatch=True)


def remove_hooks(wrapped: ModelChunks) -> None:
    """Gather the weights that the last step has updated, and remove the hooks that gather weights in forward passes."""
    gather_weights(wrapped)
    for chunk in wrapped:
        if chunk.ddp_config.overlap_param_gather:
            chunk.disable_forward_pre_hook(param_sync=False)
            if hasattr(chunk, "head_hook"):
                chunk.head_hook.remove()


def unwrap(model: ModelChunks) -> None:
    """Undo `wrap`: free the gradients and the optimizer's state of `model`, once nothing else refers to them.

    The hooks must be removed already.
    """
    model.config.finalize_model_grads_func = model.config.no_sync_func = None
    parameter: Any
    for parameter in model.parameters():
        parameter.grad = parameter.main_grad = None
        # Megatron's optimizer leaves its main weights here in bfloat16.
        parameter.main_param = None
    # The wrapper and its hooks refer to each other.
    gc.collect()
    free_cached_memory(model.device)


def _gather_head(chunk: DistributedDataParallel) -> None:
    """Have the forward pass gather the head's weight before the loss.

    A module's weights are gathered when it is called, and `Decoder` uses this one without calling its module.
    """
    decoder = unwrap_model(chunk)
    if decoder.post_process and decoder.output_layer.weight is not None:
        group = chunk.param_to_bucket_group[decoder.output_layer.weight]
        chunk.head_hook = decoder.decoder.register_forward_hook(lambda *_: group.finish_param_sync())
