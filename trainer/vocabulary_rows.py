"""Checkpoints for a pruned vocabulary: the rows of embedding and head to keep, in their new order."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from data_scoring.config import padded_vocab_size
from trainer.checkpoint_folder import read_checkpoint_record
from trainer.checkpoint_shapes import EMBEDDING, HEAD, read_shapes
from trainer.weights import Weights, write_weights


def check_rows(checkpoint: Path, vocab_size: int) -> int:
    """Return the number of rows in a checkpoint's embedding.

    Raises ValueError if the checkpoint is damaged, holds pickles that would run code, or is not that of a model with
    `vocab_size` tokens.
    """
    rows = read_shapes(checkpoint).get(EMBEDDING, (0,))[0]
    trained_with = read_checkpoint_record(checkpoint).get("vocab_size", vocab_size)
    if rows < vocab_size or trained_with != vocab_size:
        raise ValueError(
            f"{checkpoint}: its embedding has {rows} rows for {min(rows, trained_with)} tokens, but the tokenizer has "
            f"{vocab_size}; give the tokenizer that it was trained with"
        )
    return rows


def select_rows(tensor_vh: Tensor, kept: Sequence[int]) -> Tensor:
    """Return the rows `kept` of embedding or head, [v, h], in this order, padded with rows of zeros."""
    selected = tensor_vh.new_zeros(padded_vocab_size(len(kept)), *tensor_vh.shape[1:])
    selected[: len(kept)] = tensor_vh[torch.tensor(kept)]
    return selected


def cut_checkpoint(checkpoint: Path, kept: Sequence[int], vocab_size: int, target: Path) -> None:
    """Write the weights of `checkpoint`, with only the rows of the tokens `kept`, to the folder `target`.

    All other weights are unchanged; the optimizer state is left out. `vocab_size` is the original one. Memory holds one
    tensor of one layer at a time. Raises ValueError as `check_rows` does.
    """
    check_rows(checkpoint, vocab_size)
    weights = Weights(checkpoint)

    def produce(name: str, layer: int | None) -> Tensor:
        tensor = weights.read(name, layer)
        return select_rows(tensor, kept) if name in (EMBEDDING, HEAD) else tensor

    rows = padded_vocab_size(len(kept))
    shapes = {
        name: (rows, *shape[1:]) if name in (EMBEDDING, HEAD) else shape for name, shape in weights.shapes.items()
    }
    record = read_checkpoint_record(checkpoint)
    write_weights(
        target,
        {name: (shape, weights.dtypes[name]) for name, shape in shapes.items()},
        produce,
        {**record, "vocab_size": len(kept), "cut_from": str(checkpoint)},
    )
