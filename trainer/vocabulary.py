"""A checkpoint for a smaller vocabulary: the rows of embedding and head that stay, in their new order."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from data_scoring.config import padded_vocab_size
from data_scoring.files import write_json
from trainer.checkpoint_folder import read_checkpoint_record, seal_checkpoint
from trainer.checkpoint_shapes import EMBEDDING, HEAD, read_shapes
from trainer.pickles import allow_plain_pickles_only


def check_rows(checkpoint: Path, vocab_size: int) -> int:
    """Return the rows of a checkpoint's embedding.

    Raises ValueError where the checkpoint is damaged, holds pickles that would run code, or is none of a model with
    `vocab_size` tokens.
    """
    rows = read_shapes(checkpoint).get(EMBEDDING, (0,))[0]
    trained_with = read_checkpoint_record(checkpoint).get("vocab_size", vocab_size)
    if rows < vocab_size or trained_with != vocab_size:
        raise ValueError(
            f"{checkpoint}: its embedding has {rows} rows for {min(rows, trained_with)} tokens, and the tokenizer has "
            f"{vocab_size}; give the one that it was trained with"
        )
    return rows


def padded_rows(kept: Sequence[int], counts: Sequence[int], rows: int) -> list[int]:
    """Return which of the old `rows` embedding and head have in the new order: those `kept`, then those of padding.

    Padding gets the rows of what occurs least, by `counts`, among all that is not kept: what was never a label has
    been trained to be improbable. Zeros would not be: their logit of 0 may well be above those of real tokens.
    """
    gone = sorted(set(range(rows)) - set(kept), key=lambda row: (counts[row] if row < len(counts) else 0, -row))
    missing = padded_vocab_size(len(kept)) - len(kept)
    # Where hardly anything was dropped there may be too few of them.
    padding = (gone * missing)[:missing] if gone else [min(kept, key=lambda row: counts[row])] * missing
    return [*kept, *padding]


def cut_checkpoint(checkpoint: Path, kept: Sequence[int], counts: Sequence[int], target: Path) -> None:
    """Write to the folder `target` the weights of `checkpoint` for the tokens `kept`, in their new order.

    All else of the model stays as it is; the optimizer's state is left out. `counts` says how often each old token
    occurs. One process holds the model once, on the CPU. Raises ValueError as `check_rows` does.
    """
    rows = check_rows(checkpoint, len(counts))
    allow_plain_pickles_only()
    state = _read_weights(checkpoint)
    order = torch.tensor(padded_rows(kept, counts, rows))
    for name in (EMBEDDING, HEAD):
        # A model whose head is its embedding has no head of its own.
        if name in state:
            state[name] = state[name].index_select(0, order)
    target.mkdir(parents=True)
    # Megatron knows no flattened lists.
    planner = DefaultSavePlanner(flatten_state_dict=False)
    with _alone():
        save(state, storage_writer=_Writer(target), planner=planner, no_dist=True)
    torch.save({}, target / "common.pt")
    write_json(target / "metadata.json", _BACKENDS)
    record = read_checkpoint_record(checkpoint)
    seal_checkpoint(target, {**record, "vocab_size": len(kept), "cut_from": str(checkpoint)})


class _Writer(FileSystemWriter):
    """Writes what `check_pickles` lets through: no path object, which torch would put into the metadata."""

    def storage_meta(self) -> StorageMeta | None:
        """Return what torch keeps of where and when it wrote."""
        return StorageMeta()


# What Megatron-Core writes there of a checkpoint in torch's distributed format.
_BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@contextmanager
def _alone() -> Iterator[None]:
    """Keep torch from warning that there is but one process, which is meant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def _read_weights(checkpoint: Path) -> dict[str, Any]:
    reader = FileSystemReader(checkpoint)
    state: dict[str, Tensor | None] = {}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        if name.startswith("optimizer."):
            continue
        if isinstance(entry, TensorStorageMetadata):
            state[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
        elif isinstance(entry, BytesStorageMetadata):
            state[name] = None
    with _alone():
        load(state, storage_reader=reader, no_dist=True)
    return state
