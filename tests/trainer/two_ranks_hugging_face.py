"""Results of two ranks for Hugging Face models, in the launch of `tests.trainer.two_ranks`."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_scoring.corpus.corpus import Batch
from flows.run.stored_model import find_model
from tests.hugging_face_models import MODELS, TIED
from tests.trainer.rendezvous import meet
from trainer.config import TrainConfig
from trainer.parallel_config import ParallelConfig

LAYOUTS = {"one": (1, 1), "tensor": (2, 1), "pipeline": (1, 2)}


def agree(layout: str, folder: Path, bf16: bool = False) -> dict[str, dict[str, float]]:
    """Return how far imported models are, at most, from what transformers computes: on the last stage.

    Those in bfloat16 are compared with what transformers makes in float32 of the same weights.
    """
    from megatron.core import parallel_state

    tensor, pipeline = LAYOUTS[layout]
    meet()
    parallel_state.initialize_model_parallel(tensor, pipeline)
    found = {
        name: _differences(folder, name, ParallelConfig(tensor=tensor, pipeline=pipeline), bf16)
        for name in (*MODELS, "pangu")
    }
    parallel_state.destroy_model_parallel()
    return found


def _differences(folder: Path, name: str, parallel: ParallelConfig, bf16: bool) -> dict[str, float]:
    from megatron.core import parallel_state

    from trainer.checkpoint import load_weights
    from trainer.forward import run_schedule
    from trainer.model import Kernels, build_model
    from trainer.train import make_state

    stored = find_model(folder / f"{name}-imported")
    expected = torch.load(folder / f"{name}.pt")
    rows = stored.config.vocab_size
    assert rows is not None
    model = build_model(stored.config, rows, 32, parallel, torch.get_default_device(), bf16, Kernels())
    [gpt] = model
    load_weights(stored.checkpoint, model)
    tokens: Tensor = expected["tokens"]
    if bf16:
        return _errors_of_rounding(_logits(gpt, tokens[:, :-1]), expected, rows)
    logits = _logits(gpt, tokens[:, :-1])
    differences = {}
    if logits is not None:
        differences["logits"] = float((logits[..., :rows] - expected["logits"]).abs().max())
    if name not in TIED or parallel.world_size == 1:
        return differences
    # The embedding of the first stage and that of the last are one.
    state = make_state(TrainConfig(lr=1e-3, min_lr=1e-3), model, num_steps=1, bf16=False)
    state.model.zero_grad_buffer()
    microbatch = Batch(tokens.numpy(), np.full(2, 32))
    _, sums, _ = run_schedule(state.model, [microbatch], 2, 2, 32, forward_only=False)
    if parallel_state.is_pipeline_last_stage():
        differences["losses"] = float((sums - expected["losses"].sum(dim=1)).abs().max()) / 32
    gradient = gpt.shared_embedding_or_output_weight().main_grad
    whole: Tensor = expected["gradients"]["model.embed_tokens.weight"]
    first = parallel_state.get_tensor_model_parallel_rank() * len(gradient)
    part = whole[first : first + len(gradient)]
    assert not gradient[len(part) :].any()
    differences["gradient"] = float((gradient[: len(part)] - part).abs().max() / whole.abs().max())
    return differences


def _errors_of_rounding(logits: Tensor | None, expected: dict[str, Any], rows: int) -> dict[str, float]:
    """Return the root mean square of the errors of our logits in bfloat16, and that of transformers' own."""
    if logits is None:
        return {}
    errors = {"logits": logits[..., :rows], "theirs": expected["in bfloat16"]}
    return {
        name: float((each - expected["of rounded weights"]).square().mean().sqrt()) for name, each in errors.items()
    }


def _logits(gpt: Any, tokens: Tensor) -> Tensor | None:
    """Return a model's logits, of all tensor-parallel ranks, on the last stage; None on earlier ones."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    positions = torch.arange(tokens.shape[1]).expand(len(tokens), -1)

    def step(_data: Any, model: Any) -> tuple[Tensor, Any]:
        output = model(input_ids=tokens, position_ids=positions, attention_mask=None)
        return output, lambda logits, non_loss_data: logits

    with torch.no_grad():
        collected = get_forward_backward_func()(
            forward_step_func=step, data_iterator=None, model=gpt, num_microbatches=1, seq_length=tokens.shape[1],
            micro_batch_size=len(tokens), forward_only=True, collect_non_loss_data=True,
        )  # fmt: skip
    if not parallel_state.is_pipeline_last_stage():
        return None
    parts = [torch.empty_like(collected[0]) for _ in range(parallel_state.get_tensor_model_parallel_world_size())]
    group = parallel_state.get_tensor_model_parallel_group()
    torch.distributed.all_gather(parts, collected[0].contiguous(), group=group)
    return torch.cat(parts, dim=-1)
