"""Training states that test ranks create, step and compare."""

from typing import Any

import torch
from torch import Tensor

from trainer.config import ModelConfig, TrainConfig
from trainer.parallel_config import ParallelConfig


def make(
    device: Any, model: ModelConfig, vocab_size: int, seq_length: int, parallel: ParallelConfig, bf16: bool, seed: int
) -> Any:
    """Return the state of a fresh model whose weights are drawn with `seed`."""
    from trainer.model import Kernels, build_model
    from trainer.train import make_state

    device.seed(seed)
    place = torch.get_default_device()
    built = build_model(model, vocab_size, seq_length, parallel, place, bf16, Kernels())
    return make_state(TrainConfig(lr=1e-2, min_lr=1e-3), built, 10, bf16)


def train(state: Any, seed: int) -> None:
    """Do a step with random gradients, which are those of every call with `seed`."""
    generator = torch.Generator().manual_seed(seed)
    state.model.zero_grad_buffer()
    for parameter in state.model.parameters():
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
    for chunk in state.model:
        chunk.finish_grad_sync()
    state.scheduler.step(1)
    state.optimizer.step()


def values(state: Any) -> dict[str, Tensor]:
    """Return this rank's weights, and all that its optimizer has: main weights, moments, counters, learning rates."""
    [optimizer] = state.optimizer.chained_optimizers
    groups = optimizer.optimizer.param_groups
    found = {name: parameter.detach().float().clone() for name, parameter in state.model.named_parameters()}
    for number, parameter in enumerate(parameter for group in groups for parameter in group["params"]):
        found[f"main {number}"] = parameter.detach().clone()
        for name, moment in optimizer.optimizer.state.get(parameter, {}).items():
            found[f"{name} {number}"] = moment.clone()
    return found | {"lr": torch.tensor([group["lr"] for group in groups])}
