"""Per-sample losses under the model, forward only, on any layout."""

import numpy as np
import torch
from megatron.core import parallel_state
from numpy.typing import NDArray

from data_scoring.corpus import VALIDATION, Corpus
from data_scoring.scoring import ScoreSamples, score_shard
from trainer.forward import run_schedule

# Enough microbatches at a time to fill the pipeline, few enough for progress to move.
_MICROBATCHES_A_STAGE = 8


def is_writer() -> bool:
    """Return whether this rank keeps results: the one of its layout that holds the losses and comes first."""
    return bool(
        parallel_state.is_pipeline_last_stage()
        and parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_data_parallel_rank() == 0
    )


def block_size(micro_batch_size: int) -> int:
    """Return how many samples are scored at a time."""
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    return micro_batch_size * int(parallel_state.get_data_parallel_world_size()) * int(stages) * _MICROBATCHES_A_STAGE


def make_scorer(model: torch.nn.Module, corpus: Corpus, micro_batch_size: int) -> ScoreSamples:
    """Return the function that scores samples of `corpus` under `model`; all ranks call it together.

    It returns mean next-token losses, [n] float32, nats per token, on the rank that `is_writer`, else None.
    """

    def score(shards: NDArray[np.int64], samples: NDArray[np.int64]) -> NDArray[np.float32] | None:
        with torch.no_grad():
            rows, sums, num_tokens = run_schedule(model, corpus, shards, samples, micro_batch_size, forward_only=True)
        if not parallel_state.is_pipeline_last_stage():
            return None
        losses = torch.zeros(len(samples), dtype=torch.float32)
        losses[torch.from_numpy(rows)] = sums / num_tokens
        losses = losses.to(next(model.parameters()).device)
        torch.distributed.all_reduce(losses, group=parallel_state.get_data_parallel_group())
        return losses.cpu().numpy() if is_writer() else None

    return score


def validate(score: ScoreSamples, corpus: Corpus, block: int) -> list[dict[str, object]] | None:
    """Return each source's validation loss (mean over its predicted tokens), on the rank that `is_writer`, else None.

    Rows have source, loss (nats per token) and num_tokens; sources without validation samples have none.
    """
    total = corpus.num_validation_samples
    losses = score_shard(score, VALIDATION, total, block, on_block=lambda done: None)
    if losses is None:
        return None
    losses = losses.astype(np.float64)
    lengths = corpus.read(np.full(total, VALIDATION), np.arange(total)).num_tokens
    sources = np.array(corpus.validation_sources)
    rows: list[dict[str, object]] = []
    for source in dict.fromkeys(corpus.validation_sources):
        chosen = sources == source
        num_tokens = int(lengths[chosen].sum())
        loss = float((losses[chosen] * lengths[chosen]).sum() / num_tokens)
        rows.append({"source": source, "loss": loss, "num_tokens": num_tokens})
    return rows
