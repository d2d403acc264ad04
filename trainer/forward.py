"""Forward and backward passes: microbatches, Megatron's pipeline schedule, and per-sample losses."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from numpy.typing import NDArray
from torch import Tensor

from data_scoring.corpus.corpus import Batch, Corpus
from kernels.sample_loss import sum_per_sample
from trainer.devices import send
from trainer.model_chunks import ModelChunks


def read_microbatches(
    corpus: Corpus,
    shards: NDArray[np.integer],
    samples: NDArray[np.integer],
    micro_batch_size: int,
    seq_length: int,
    weights: NDArray[np.float32] | None = None,
) -> Iterator[Batch]:
    """Yield this rank's microbatches of the samples given by shard and index, for `run_schedule`.

    They are truncated and padded to `seq_length` tokens. Only the first and last pipeline stages need the tokens; on
    others they are zero. weights: of the samples' losses.
    """
    edge = parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage()
    for microbatch in deal_rows(len(samples), micro_batch_size):
        tokens = np.zeros((micro_batch_size, seq_length + 1), np.int64)
        num_tokens = np.zeros(micro_batch_size, np.int64)
        # Rows beyond the last sample pad the microbatch; their tokens do not count.
        real = microbatch[microbatch < len(samples)]
        if edge and len(real):
            batch = corpus.read(shards[real], samples[real], seq_length)
            tokens[: len(real)], num_tokens[: len(real)] = batch.tokens, batch.num_tokens
        padded = None
        if weights is not None:
            padded = np.zeros(micro_batch_size, np.float32)
            padded[: len(real)] = weights[real]
        yield Batch(tokens, num_tokens, padded)


def deal_rows(num_samples: int, micro_batch_size: int) -> list[NDArray[np.int64]]:
    """Return the rows of each microbatch of this rank's replica; in the last ones, they may exceed the samples."""
    per_round = micro_batch_size * int(parallel_state.get_data_parallel_world_size())
    first = int(parallel_state.get_data_parallel_rank()) * micro_batch_size
    num_microbatches = -(-num_samples // per_round)
    if parallel_state.get_virtual_pipeline_model_parallel_world_size() is not None:
        # Megatron's interleaved schedule takes a multiple of the pipeline stages.
        num_microbatches += -num_microbatches % int(parallel_state.get_pipeline_model_parallel_world_size())
    starts = range(first, num_microbatches * per_round, per_round)
    return [np.arange(start, start + micro_batch_size) for start in starts]


def run_schedule(
    model: ModelChunks,
    microbatches: Iterable[Batch],
    num_samples: int,
    micro_batch_size: int,
    seq_length: int,
    forward_only: bool,
    prefixes: tuple[int, ...] | None = None,
) -> tuple[NDArray[np.int64], Tensor, Tensor]:
    """Run forward and, unless `forward_only`, backward over the microbatches of `num_samples` samples.

    The samples are divided among data-parallel ranks; `microbatches` come from `read_microbatches` on this rank. All
    ranks must pass the same `seq_length`, which sets the shapes that pipeline stages receive. Returns, on the last
    pipeline stage, the rows of the samples of this rank's replica, [n] int64, their summed losses on the device, [n]
    float32, nats, and their numbers of predicted tokens in host memory, [n] int64; on other stages three empty ones.
    With `prefixes`, sums and numbers cover the first `prefix` tokens of each sample, [n, len(prefixes)]. The gradient
    is that of the sum of all losses, each times its sample's weight if the microbatches have weights, divided by all
    predicted tokens in `finalize_gradients`; the returned losses are not weighted. The host does not wait for the
    device.
    """
    rows = deal_rows(num_samples, micro_batch_size)
    device = model.device
    # Every chunk goes through the microbatches at its own pace.
    share = list(microbatches)
    losses: list[dict[str, Tensor]] = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, prefixes),
        data_iterator=[_on_device(share, seq_length, device) for _ in model],
        model=list(model),
        num_microbatches=len(rows),
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )
    if not losses:
        return np.empty(0, np.int64), torch.empty(0, device=device), torch.empty(0, dtype=torch.int64)
    taken = np.concatenate(rows)
    # Rows ascend, so that those beyond the last sample come last.
    count = int((taken < num_samples).sum())
    sums, num_tokens = (torch.cat([entry[name] for entry in losses])[:count] for name in ("sums", "num_tokens"))
    return taken[:count], sums, num_tokens


def _on_device(microbatches: Iterable[Batch], seq_length: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    position_s = torch.arange(seq_length, device=device)
    for batch in microbatches:
        num_tokens = torch.from_numpy(batch.num_tokens)
        yield {
            "tokens": send(torch.from_numpy(batch.tokens), device),
            "num_tokens": send(num_tokens, device),
            "num_tokens_on_host": num_tokens,
            "positions": position_s.expand(len(batch.tokens), -1),
            **({} if batch.weights is None else {"weights": send(torch.from_numpy(batch.weights), device)}),
        }


def _forward_step(
    prefixes: tuple[int, ...] | None, data: Iterator[dict[str, Tensor]], model: torch.nn.Module
) -> tuple[Tensor, Any]:
    batch = next(data)
    output = model(
        input_ids=batch["tokens"][:, :-1].contiguous(),
        position_ids=batch["positions"],
        attention_mask=None,
        labels=batch["tokens"][:, 1:].contiguous(),
    )
    return output, partial(_loss, batch["num_tokens"], batch["num_tokens_on_host"], batch.get("weights"), prefixes)


def _loss(
    num_tokens_b: Tensor,
    on_host_b: Tensor,
    weights_b: Tensor | None,
    prefixes: tuple[int, ...] | None,
    token_loss_bs: Tensor,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the sum of losses, weighted, its number of tokens, and what `run_schedule` returns of each sample.

    num_tokens_b: [batch] int64, on the device; on_host_b: the same in host memory; weights_b: [batch] float32, on the
    device; None: 1 each.
    """
    sums_b = sum_per_sample(token_loss_bs, num_tokens_b)
    kept = {"sums": sums_b.detach(), "num_tokens": on_host_b}
    if prefixes is not None:
        sums = [sum_per_sample(token_loss_bs, num_tokens_b.clamp(max=prefix)) for prefix in prefixes]
        counts = [on_host_b.clamp(max=prefix) for prefix in prefixes]
        kept = {"sums": torch.stack(sums, dim=1), "num_tokens": torch.stack(counts, dim=1)}
    weighted_b = sums_b if weights_b is None else sums_b * weights_b
    return weighted_b.sum(), num_tokens_b.sum().int(), kept
