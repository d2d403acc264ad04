"""Samples through the model: microbatches, Megatron's pipeline schedule, and each sample's loss."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from numpy.typing import NDArray
from torch import Tensor

from data_scoring.corpus import Corpus
from kernels.sample_loss import sum_per_sample


def run_schedule(
    model: torch.nn.Module,
    corpus: Corpus,
    shards: NDArray[np.integer],
    samples: NDArray[np.integer],
    micro_batch_size: int,
    forward_only: bool,
) -> tuple[NDArray[np.int64], Tensor, Tensor]:
    """Run the model, and unless `forward_only` its backward pass, over the samples identified by shard and number.

    The data-parallel ranks share the work, microbatch by microbatch. Returns, on the last pipeline stage, the rows of
    `samples` that this rank's replica took, [n] int64, with their summed losses, [n] float32, nats, and numbers of
    predicted tokens, [n] int64; on other stages three empty ones. The gradient is that of the sum of all losses,
    divided by all predicted tokens in Megatron's `finalize_model_grads`.
    """
    replicas = parallel_state.get_data_parallel_world_size()
    per_round = micro_batch_size * replicas
    num_microbatches = -(-len(samples) // per_round)
    first = parallel_state.get_data_parallel_rank() * micro_batch_size
    starts = range(first, num_microbatches * per_round, per_round)
    rows = [np.arange(start, start + micro_batch_size) for start in starts]
    losses: list[dict[str, Tensor]] = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=_microbatches(corpus, shards, samples, rows, next(model.parameters()).device),
        model=[model],
        num_microbatches=num_microbatches,
        seq_length=corpus.seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )
    if not losses:
        return np.empty(0, np.int64), torch.empty(0), torch.empty(0, dtype=torch.int64)
    taken = np.concatenate(rows)
    real = taken < len(samples)
    keep = torch.from_numpy(real)
    sums = torch.cat([entry["sums"] for entry in losses]).cpu()[keep]
    num_tokens = torch.cat([entry["num_tokens"] for entry in losses]).cpu()[keep]
    return taken[real], sums, num_tokens


def _microbatches(
    corpus: Corpus,
    shards: NDArray[np.integer],
    samples: NDArray[np.integer],
    rows: list[NDArray[np.int64]],
    device: torch.device,
) -> Iterator[dict[str, Tensor]]:
    edge = parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage()
    position_s = torch.arange(corpus.seq_length, device=device)
    for microbatch in rows:
        tokens = torch.zeros((len(microbatch), corpus.seq_length + 1), dtype=torch.int64)
        num_tokens = torch.zeros(len(microbatch), dtype=torch.int64)
        # Rows beyond the last sample fill up the microbatch; none of their tokens counts.
        real = microbatch[microbatch < len(samples)]
        if edge and len(real):
            batch = corpus.read(shards[real], samples[real])
            tokens[: len(real)] = torch.from_numpy(batch.tokens)
            num_tokens[: len(real)] = torch.from_numpy(batch.num_tokens)
        yield {
            "tokens": tokens.to(device, non_blocking=True),
            "num_tokens": num_tokens.to(device, non_blocking=True),
            "positions": position_s.expand(len(microbatch), -1),
        }


def _forward_step(data: Iterator[dict[str, Tensor]], model: torch.nn.Module) -> tuple[Tensor, Any]:
    batch = next(data)
    output = model(
        input_ids=batch["tokens"][:, :-1].contiguous(),
        position_ids=batch["positions"],
        attention_mask=None,
        labels=batch["tokens"][:, 1:].contiguous(),
    )
    return output, partial(_loss, batch["num_tokens"])


def _loss(num_tokens_b: Tensor, token_loss_bs: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    sums_b = sum_per_sample(token_loss_bs, num_tokens_b)
    return sums_b.sum(), num_tokens_b.sum().int(), {"sums": sums_b.detach(), "num_tokens": num_tokens_b}
