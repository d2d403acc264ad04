"""Gradients from the end of the backward pass to the update, without the host waiting for the device.

Megatron's own functions read numbers on the host: the number of tokens, and without Apex or Transformer Engine the
norm of every gradient.
"""

from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel.utils import get_pp_last_rank
from torch import Tensor

from trainer.devices import has_fused_adam, widest_dtype

# Megatron's, so that a gradient of zero is no division by zero.
_EPSILON = 1e-6


def finalize_gradients(model: list[Any], num_tokens: Tensor, pg_collection: Any, **options: Any) -> None:
    """Reduce the gradients over all ranks, and divide them by the tokens of the whole batch.

    Megatron's schedules call this after the last backward pass. num_tokens: [] int32, those of this replica on the last
    pipeline stage, zero on others.
    """
    finalize_model_grads(model, None, pg_collection=pg_collection, **options)
    torch.distributed.broadcast(num_tokens, get_pp_last_rank(pg_collection.pp), pg_collection.pp)
    torch.distributed.all_reduce(num_tokens, group=pg_collection.dp_cp)
    for chunk in model:
        chunk.scale_gradients(1.0 / num_tokens.clamp(min=1))


@torch.no_grad()
def update_weights(optimizer: Any, device: torch.device) -> Tensor:
    """Update the weights with the gradients, clipped; return the gradients' norm before that, [] on the device.

    optimizer: of `get_megatron_optimizer`, with a single optimizer in the chain, on `device`. This is Megatron's
    `ChainedOptimizer.step`, with a norm that stays on the device. A norm that is not finite makes the weights useless.
    """
    [inner] = optimizer.chained_optimizers
    inner.prepare_grads()
    # These exclude parameters that another tensor-parallel rank or pipeline stage has as well.
    norm = measure_norm(inner.get_main_grads_for_grad_norm(), inner.get_grad_stats_parallel_group(), device)
    if inner.config.clip_grad > 0:
        clip([each.grad for each in inner.get_parameters() if each.grad is not None], inner.config.clip_grad, norm)
    inner.step_with_ready_grads()
    return norm


def set_adam_kernel(optimizer: Any) -> None:
    """Have torch's Adam update all parameters with a single kernel, where it has one.

    Otherwise it takes a dozen, each of which reads or writes all parameters or moments. To be called again when
    `optimizer`, of `get_megatron_optimizer`, has loaded a state, with which come the settings of the device it is from.
    """
    [inner] = optimizer.chained_optimizers
    if not isinstance(inner.optimizer, torch.optim.AdamW):
        return
    for group in inner.optimizer.param_groups:
        group["fused"] = all(has_fused_adam(each.device.type) for each in group["params"]) or None
    for parameter, state in inner.optimizer.state.items():
        # That kernel counts steps on the device, the others on the host. Megatron loads one tensor for all parameters,
        # which each of them would advance.
        if isinstance(state.get("step"), torch.Tensor):
            is_fused = has_fused_adam(parameter.device.type)
            state["step"] = state["step"].to(parameter.device if is_fused else "cpu", copy=True)


def measure_norm(gradients: list[Tensor], group: Any, device: torch.device) -> Tensor:
    """Return the L2 norm of the gradients of all ranks of `group`, each of which has different ones, [] on `device`."""
    norms = torch._foreach_norm(gradients) if gradients else (torch.zeros((), device=device),)
    # Reduced in single precision, as by Megatron: Ascend's collectives support no other.
    square = torch.linalg.vector_norm(torch.stack(norms)).float().square()
    torch.distributed.all_reduce(square, group=group)
    norm: Tensor = square.to(widest_dtype(device.type)).sqrt()
    return norm


def clip(gradients: list[Tensor], max_norm: float, norm: Tensor) -> None:
    """Scale `gradients`, whose norm is `norm`, in place, so that it is at most `max_norm`."""
    scale = (max_norm / (norm + _EPSILON)).clamp(max=1.0).float()
    # Looking at a number in host memory takes no time, and spares a pass over the gradients.
    if gradients and not (scale.device.type == "cpu" and scale == 1.0):
        torch._foreach_mul_(gradients, scale)
