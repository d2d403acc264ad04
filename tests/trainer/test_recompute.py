"""Training with recomputation: losses and gradients are those without, and fewer tensors are kept."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_scoring.corpus.corpus import Batch
from tests.forked_ranks import run_ranks
from trainer.config import ModelConfig, Recompute
from trainer.devices import initialise
from trainer.parallel_config import ParallelConfig

SEQ_LENGTH, VOCAB_SIZE, BATCH = 32, 256, 2
SHAPES = (
    {},
    {"activation_terms": 2, "shortcut_reduction": 4, "ffn_bias": True, "num_query_groups": 2, "attention_bias": "all"},
)
CASES = [(shape, bf16) for shape in range(len(SHAPES)) for bf16 in (False, True)]


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    device = initialise("cpu", 0)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel()
    recomputed: tuple[Recompute, ...] = ("none", "selective", "full")
    found = {}
    for shape, bf16 in CASES:
        for recompute in recomputed:
            device.seed(0)
            found[shape, bf16, recompute] = _train(ModelConfig(num_layers=2, **SHAPES[shape]), bf16, recompute)
    torch.save(found, folder / "found.pt")


def _train(model: ModelConfig, bf16: bool, recompute: Recompute) -> dict[str, Any]:
    """Return a batch's losses, all gradients, and how many numbers the forward pass kept for the backward pass."""
    from trainer.forward import run_schedule
    from trainer.model import Kernels, build_model
    from trainer.train import wrap

    model_chunks = build_model(
        model, VOCAB_SIZE, SEQ_LENGTH, ParallelConfig(), torch.device("cpu"), bf16, Kernels(recompute=recompute)
    )
    [gpt], wrapped = model_chunks, wrap(model_chunks, bf16, is_sharded=False)
    wrapped.zero_grad_buffer()
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, (BATCH, SEQ_LENGTH + 1))
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().size() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        gpt.train()
        labels = torch.from_numpy(tokens[:, 1:])
        position = torch.arange(SEQ_LENGTH).expand(BATCH, -1)
        loss = gpt(torch.from_numpy(tokens[:, :-1]), position, None, labels=labels)
    del loss
    batches = [Batch(tokens, np.full(BATCH, SEQ_LENGTH))]
    _, sums, _ = run_schedule(wrapped, batches, BATCH, BATCH, SEQ_LENGTH, forward_only=False)
    gradients = torch.cat([buffer.grad_data.clone() for chunk in wrapped for buffer in chunk.buffers])
    return {"losses": sums, "gradients": gradients, "kept": sum(kept.values())}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("recompute")
    run_ranks(work, folder, num_ranks=1)
    return torch.load(folder / "found.pt", weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize(("shape", "bf16"), CASES)
def test_results_are_those_without(found: dict[Any, dict[str, Any]], shape: int, bf16: bool, recompute: str) -> None:
    plain, again = found[shape, bf16, "none"], found[shape, bf16, recompute]
    assert plain["gradients"].abs().max() > 1e-3
    torch.testing.assert_close(again["losses"], plain["losses"], atol=1e-6, rtol=0)
    torch.testing.assert_close(again["gradients"], plain["gradients"], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("shape", "bf16"), CASES)
def test_less_is_kept(found: dict[Any, dict[str, Any]], shape: int, bf16: bool) -> None:
    plain, selective, full = (found[shape, bf16, each]["kept"] for each in ("none", "selective", "full"))
    model = ModelConfig(num_layers=2, **SHAPES[shape])  # type: ignore[arg-type]
    # The outputs of two norms and of the activation.
    outputs = 2 * BATCH * SEQ_LENGTH * (2 * model.hidden_size + model.ffn_size)
    assert plain - selective >= outputs
    assert full < selective
