"""Per-sample losses of the model, forward only, on any layout."""

import numpy as np
import torch
from megatron.core import parallel_state
from numpy.typing import NDArray
from torch import Tensor

from data_scoring.corpus.corpus import VALIDATION, Batch, Corpus
from data_scoring.losses.shard_scoring import Block, score_samples
from trainer.devices import send
from trainer.forward import read_microbatches, run_schedule
from trainer.model_chunks import ModelChunks

# Enough microbatches to fill the pipeline, few enough for frequent progress reports.
_MICROBATCHES_A_STAGE = 8


def is_writer() -> bool:
    """Return whether this rank writes results: it is the first rank of the layout that holds the losses."""
    return bool(
        parallel_state.is_pipeline_last_stage()
        and parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_data_parallel_rank() == 0
    )


class ModelScorer:
    """A `Scorer`: mean next-token losses, nats per token, of samples of `corpus` under `model`, on any layout.

    There is one column per entry of `prefixes`, with the loss over that many first tokens; by default over all.
    """

    def __init__(
        self, model: ModelChunks, corpus: Corpus, micro_batch_size: int, prefixes: tuple[int, ...] = ()
    ) -> None:
        self._model, self._corpus, self._micro_batch_size = model, corpus, micro_batch_size
        self._prefixes = prefixes or (corpus.seq_length,)
        self._device = model.device
        stages, replicas = (
            int(parallel_state.get_pipeline_model_parallel_world_size()),
            int(parallel_state.get_data_parallel_world_size()),
        )
        # With sequence parallelism, the tensor-parallel size must divide the sequence length.
        config = model.config
        self._multiple = config.tensor_model_parallel_size if config.sequence_parallel else 1
        self.block_size = micro_batch_size * replicas * stages * _MICROBATCHES_A_STAGE
        self.is_writer = is_writer()

    def read(self, block: Block) -> list[Batch]:
        """Return this rank's microbatches of a block; uses neither the model nor the device."""
        return list(
            read_microbatches(self._corpus, block.shards, block.samples, self._micro_batch_size, self._length(block))
        )

    def _length(self, block: Block) -> int:
        """Return the length, in tokens, to which a block's samples are padded."""
        return -(-block.seq_length // self._multiple) * self._multiple

    def score(self, block: Block, share: list[Batch]) -> NDArray[np.float32] | None:
        """Return the losses of a block, [n, number of prefixes] float32, on the rank that `is_writer`, else None."""
        count = len(block.samples)
        with torch.no_grad():
            rows, sums, num_tokens = self._sum_losses(share, count, self._length(block))
        if not parallel_state.is_pipeline_last_stage():
            return None
        losses = torch.zeros((count, sums.shape[1]), dtype=torch.float32)
        losses[torch.from_numpy(rows)] = sums.cpu() / num_tokens
        losses = send(losses, self._device)
        torch.distributed.all_reduce(losses, group=parallel_state.get_data_parallel_group())
        return losses.cpu().numpy() if self.is_writer else None

    def _sum_losses(self, share: list[Batch], count: int, length: int) -> tuple[NDArray[np.int64], Tensor, Tensor]:
        """Return the rows of this replica's samples, their summed losses and token counts, one column per prefix."""
        return run_schedule(self._model, share, count, self._micro_batch_size, length, True, self._prefixes)

    def agree(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return, on all ranks, the `numbers` of the rank that `is_writer`, [n] int64."""
        agreed = torch.from_numpy(numbers if self.is_writer else np.zeros_like(numbers)).to(self._device)
        torch.distributed.all_reduce(agreed)
        return agreed.cpu().numpy()


def validation_losses(scorer: ModelScorer, corpus: Corpus) -> NDArray[np.float32] | None:
    """Return the losses of the validation samples, [n] nats per token, on the rank that `is_writer`, else None."""
    total = corpus.num_validation_samples
    found = score_samples(corpus, scorer, np.full(total, VALIDATION), np.arange(total), corpus.lengths(VALIDATION))
    return None if found is None else found[:, 0]


def loss_by_source(corpus: Corpus, losses: NDArray[np.float32]) -> list[dict[str, object]]:
    """Return each source's mean over its predicted validation tokens, given the `losses` of the samples, [n].

    Rows have source, loss (nats per token) and num_tokens; sources without validation samples have no row.
    """
    lengths, sources = corpus.lengths(VALIDATION), np.array(corpus.validation_sources)
    rows: list[dict[str, object]] = []
    for source in dict.fromkeys(corpus.validation_sources):
        chosen = sources == source
        num_tokens = int(lengths[chosen].sum())
        loss = float((losses[chosen].astype(np.float64) * lengths[chosen]).sum() / num_tokens)
        rows.append({"source": source, "loss": loss, "num_tokens": num_tokens})
    return rows
