"""Layer ablation: the loss without each block of consecutive layers, from a single pass over the samples.

A variant that leaves out a block equals the whole model up to that block. Each variant therefore branches off from the
whole model's hidden states there and runs only the layers after its block. Variants are concatenated along the batch
and pass a layer together.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_scoring.base.parquet import write_parquet
from data_scoring.base.progress import Progress
from data_scoring.corpus.corpus import Batch, Corpus
from data_scoring.losses.calibration import draw_calibration_set
from data_scoring.losses.shard_scoring import check_finite, cut_blocks, longest_first, score_blocks
from kernels.sample_loss import sum_per_sample
from trainer.forward import deal_rows
from trainer.model_chunks import ModelChunks, pass_through
from trainer.score import ModelScorer

if TYPE_CHECKING:
    from trainer.jobs import AblationJob

# One row per block; the first has length 0 and is the whole model. Losses are in nats per token.
_RESULT = pa.schema(
    [
        ("start", pa.int32()),
        ("length", pa.int32()),
        ("loss", pa.float64()),
        ("increase", pa.float64()),
        ("stderr", pa.float64()),
    ]
)
# Enough to reuse a layer's weights for many rows, few enough to fit beside the states of all variants.
_VARIANTS_AT_ONCE = 8


class LayerBlock(NamedTuple):
    """A block of consecutive layers that a variant leaves out: the first, counted from 0, and the number of layers."""

    start: int
    length: int

    @property
    def end(self) -> int:
        """Return the first layer after the block."""
        return self.start + self.length


WHOLE = LayerBlock(0, 0)
# The hidden states, [seq, batch, hidden], of the whole model and of the variants that have branched off.
_States = dict[LayerBlock, Tensor]


def list_blocks(num_layers: int, longest: int) -> list[LayerBlock]:
    """Return the variants of a model: the whole model, then all blocks of one layer, of two, up to `longest`."""
    lengths = range(1, min(longest, num_layers) + 1)
    return [WHOLE, *(LayerBlock(start, length) for length in lengths for start in range(num_layers - length + 1))]


@contextmanager
def skipping(model: ModelChunks, block: LayerBlock) -> Iterator[None]:
    """Make this rank's chunks of a model leave out the layers of a block within the context."""
    # Megatron counts layers from 1.
    skipped = [layer for layer in model.layers if block.start < layer.layer_number <= block.end]
    for layer in skipped:
        layer.forward = _pass_on
    try:
        yield
    finally:
        for layer in skipped:
            del layer.forward


def _pass_on(hidden_states: Tensor, *_: Any, context: Tensor | None = None, **__: Any) -> tuple[Tensor, Tensor | None]:
    return hidden_states, context


def measure_ablation(job: "AblationJob", corpus: Corpus, model: ModelChunks, progress: Progress) -> None:
    """Write how the loss increases without each block of layers to `job.result`.

    Every rank calls this; one of them writes. Raises ValueError if a loss is not finite.
    """
    shards, samples = draw_calibration_set(
        [corpus.num_samples(shard) for shard in range(corpus.num_shards)], job.num_samples, job.seed, 0
    )
    lengths = np.concatenate(
        [corpus.lengths(int(shard))[samples[shards == shard]] for shard in np.unique(shards)], dtype=np.int64
    )
    order = longest_first(lengths)
    shards, samples, lengths = shards[order], samples[order], lengths[order]
    variants = list_blocks(job.model.num_layers, job.longest_block)
    scorer = AblationScorer(model, corpus, job.micro_batch_size, variants)
    parts = []
    blocks = cut_blocks(shards, samples, lengths, scorer.block_size, corpus.seq_length)
    for _, losses in score_blocks(scorer, blocks):
        if losses is not None:
            parts.append(losses)
            progress("ablating layers (samples)", sum(map(len, parts)), len(samples))
    if not scorer.is_writer:
        return
    found = np.concatenate(parts)
    check_finite(job.result, shards, samples, found)
    rows = [
        {"start": variant.start, "length": variant.length, **row}
        for variant, row in zip(variants, summarise_ablation(found, lengths), strict=True)
    ]
    write_parquet(job.result, pa.Table.from_pylist(rows, _RESULT), job.fingerprint)


def summarise_ablation(losses: NDArray[np.floating], num_tokens: NDArray[np.integer]) -> list[dict[str, float | None]]:
    """Return each variant's mean loss per token, its increase over the first one, and that increase's standard error.

    losses: [samples, variants], nats per token; num_tokens: [samples]. Samples are weighted by their tokens. The error
    is that of a ratio of means over samples, paired between variants; None for a single sample.
    """
    weights = num_tokens / num_tokens.sum()
    means = weights @ losses.astype(np.float64)
    differences = losses.astype(np.float64) - losses[:, :1]
    increases = weights @ differences
    count = len(weights)
    errors: list[float | None] = [None] * len(means)
    if count > 1:
        squares = weights**2 @ (differences - increases) ** 2
        errors = np.sqrt(squares * (count / (count - 1))).tolist()
    return [
        {"loss": loss, "increase": increase, "stderr": error}
        for loss, increase, error in zip(means.tolist(), increases.tolist(), errors, strict=True)
    ]


class AblationScorer(ModelScorer):
    """A `Scorer` with one column of losses per variant in `blocks`, in their order."""

    def __init__(self, model: ModelChunks, corpus: Corpus, micro_batch_size: int, blocks: list[LayerBlock]) -> None:
        super().__init__(model, corpus, micro_batch_size)
        self._blocks = blocks

    def _sum_losses(self, share: list[Batch], count: int, length: int) -> tuple[NDArray[np.int64], Tensor, Tensor]:
        sums = [loss_sums for batch in share if (loss_sums := self._sums(batch, length)) is not None]
        if not sums:
            return np.empty(0, np.int64), torch.empty(0), torch.empty(0)
        taken = np.concatenate(deal_rows(count, self._micro_batch_size))
        keep = torch.from_numpy(taken < count)
        num_tokens = torch.cat([torch.from_numpy(batch.num_tokens) for batch in share])
        return taken[taken < count], torch.cat(sums)[keep], num_tokens[keep, None]

    def _sums(self, batch: Batch, length: int) -> Tensor | None:
        """Return, on the last pipeline stage, the summed losses of a microbatch, [batch, variants] float32, nats."""

        def shape(gpt: Any) -> tuple[int, ...]:
            carriers = self._carriers(gpt.decoder.layers[0].layer_number - 1)
            return len(carriers), length // self._multiple, len(batch.tokens), gpt.config.hidden_size

        def compute(gpt: Any, received: Tensor | None) -> Tensor:
            states = self._go_through_layers(gpt, self._begin(gpt, batch, received), gpt.rotary_pos_emb(length))
            if gpt.post_process:
                return self._losses(gpt, states, batch)
            # States that variants share are sent once.
            return torch.stack([states[carrier] for carrier in self._carriers(gpt.decoder.layers[-1].layer_number)])

        return pass_through(self._model, shape, compute)

    def _begin(self, gpt: Any, batch: Batch, received: Tensor | None) -> _States:
        """Return the input states of a chunk's first layer: the embedding, or what the chunk before has sent."""
        if received is None:
            tokens = torch.from_numpy(batch.tokens[:, :-1]).to(self._device)
            return {WHOLE: gpt.embedding(input_ids=tokens, position_ids=None)}
        position = gpt.decoder.layers[0].layer_number - 1
        carried = dict(zip(self._carriers(position), received, strict=True))
        return {block: carried[_carrier(block, position)] for block in self._begun(position)}

    def _carriers(self, position: int) -> list[LayerBlock]:
        """Return the variants whose states, before the layer at `position`, are those of all variants."""
        return list(dict.fromkeys(_carrier(block, position) for block in self._begun(position)))

    def _begun(self, position: int) -> Iterator[LayerBlock]:
        """Return the whole model and the variants whose block begins before the layer at `position`."""
        return (block for block in self._blocks if block == WHOLE or block.start < position)

    def _go_through_layers(self, gpt: Any, states: _States, rotary: Tensor) -> _States:
        """Return the states after a chunk's layers."""
        for layer in gpt.decoder.layers:
            position = layer.layer_number - 1
            # Until its block ends, a variant has the state that it branched off from, which all such variants share.
            states |= {block: states[WHOLE] for block in self._blocks if block.length and block.start == position}
            going = [block for block in states if not block.start <= position < block.end]
            for variants in _chunks(going):
                together = torch.cat([states[block] for block in variants], dim=1)
                output, _ = layer(hidden_states=together, attention_mask=None, rotary_pos_emb=rotary)
                states |= zip(variants, output.chunk(len(variants), dim=1), strict=True)
        return states

    def _losses(self, gpt: Any, states: _States, batch: Batch) -> Tensor:
        """Return the summed losses of a microbatch's samples, [batch, variants] float32, nats."""
        labels = torch.from_numpy(batch.tokens[:, 1:]).to(self._device)
        num_tokens = torch.from_numpy(batch.num_tokens).to(self._device)
        columns: list[Tensor] = []
        for variants in _chunks(self._blocks):
            together = torch.cat([states[block] for block in variants], dim=1)
            token_loss = gpt._postprocess(
                hidden_states=gpt.decoder.final_layernorm(together), labels=labels.repeat(len(variants), 1)
            )
            columns += sum_per_sample(token_loss, num_tokens.repeat(len(variants))).chunk(len(variants))
        return torch.stack(columns, dim=1).cpu()


def _carrier(block: LayerBlock, position: int) -> LayerBlock:
    """Return the variant that represents `block` at `position`, where both have the same state.

    Within its block, a variant has the state that it branched off from; so does the variant that starts with it and
    whose block ends at `position`.
    """
    return block if block.end <= position else LayerBlock(block.start, position - block.start)


def _chunks(blocks: list[LayerBlock]) -> Iterable[list[LayerBlock]]:
    return (blocks[place : place + _VARIANTS_AT_ONCE] for place in range(0, len(blocks), _VARIANTS_AT_ONCE))
