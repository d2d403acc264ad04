"""Greedy generation with a cache of keys and values, on any layout, and how fast it is."""

import time
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor


@torch.inference_mode()
def generate(model: Any, prompts_bs: Tensor, num_new_tokens: int, vocab_size: int) -> Tensor:
    """Return the most probable continuations, [batch, num_new_tokens] int64, on every rank of the replica.

    prompts_bs: [batch, prompt] int64, on the model's device, alike on all ranks. Ids from `vocab_size` on, which pad
    the embedding, are never taken.
    """
    batch_size, num_prompt_tokens = prompts_bs.shape
    context = StaticInferenceContext(batch_size, num_prompt_tokens + num_new_tokens)
    tokens_bs = prompts_bs
    new_b: list[Tensor] = []
    for _ in range(num_new_tokens):
        logits_bv = _logits_of_the_next(model, tokens_bs, context)
        next_b = prompts_bs.new_empty(batch_size)
        if logits_bv is not None:
            next_b = logits_bv[:, :vocab_size].argmax(dim=-1)
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            torch.distributed.broadcast(next_b, last, parallel_state.get_pipeline_model_parallel_group())
        new_b.append(next_b)
        context.sequence_len_offset += tokens_bs.shape[1]
        context.enable_decode_mode()
        tokens_bs = next_b[:, None]
    return torch.stack(new_b, dim=1)


def _logits_of_the_next(model: Any, tokens_bs: Tensor, context: StaticInferenceContext) -> Tensor | None:
    """Return the logits after the last of the tokens, [batch, padded vocabulary], on the last pipeline stage."""
    start, length = context.sequence_len_offset, tokens_bs.shape[1]
    position_bs = torch.arange(start, start + length, device=tokens_bs.device).expand(len(tokens_bs), -1)
    stages = parallel_state.get_pipeline_model_parallel_group()
    if not parallel_state.is_pipeline_first_stage():
        config = model.config
        hidden_sbh = torch.empty(
            (length, len(tokens_bs), config.hidden_size), dtype=config.pipeline_dtype, device=tokens_bs.device
        )
        torch.distributed.recv(hidden_sbh, parallel_state.get_pipeline_model_parallel_prev_rank(), stages)
        model.set_input_tensor(hidden_sbh)
    output: Tensor = model(
        input_ids=tokens_bs,
        position_ids=position_bs,
        attention_mask=None,
        inference_context=context,
        runtime_gather_output=True,
    )
    if parallel_state.is_pipeline_last_stage():
        return output[:, -1]
    torch.distributed.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank(), stages)
    return None


def measure_generation(
    model: Any, batch_size: int, num_prompt_tokens: int, num_new_tokens: int, vocab_size: int, seed: int
) -> dict[str, Any]:
    """Return how many new tokens a second one replica generates, all sequences of the batch together, and the first.

    The prompts are random; a short generation before the one that is measured warms up. The first sequence's tokens
    are those of its prompt and of its continuation.
    """
    device = next(model.parameters()).device
    prompts = np.random.default_rng(seed).integers(0, vocab_size, (batch_size, num_prompt_tokens))
    prompts_bs = torch.from_numpy(prompts).to(device)
    generate(model, prompts_bs, min(8, num_new_tokens), vocab_size).cpu()
    started = time.perf_counter()
    # Copying the result waits for the device to be done.
    new_bs = generate(model, prompts_bs, num_new_tokens, vocab_size).cpu()
    seconds = time.perf_counter() - started
    return {
        "tokens_per_second": batch_size * num_new_tokens / seconds,
        "first_sequence": prompts[0].tolist() + new_bs[0].tolist(),
    }
