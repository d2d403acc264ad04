"""Reading and writing the weights in a checkpoint without Megatron, one tensor of one layer at a time.

Tensors have the names and shapes of `trainer.checkpoint_shapes`; layers are stacked along the first axis.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from data_scoring.base.files import disk_error, making, write_json
from trainer.checkpoint_folder import seal_checkpoint
from trainer.checkpoint_shapes import Shape, read_shapes
from trainer.pickles import allow_plain_pickles_only

LAYERS = "decoder.layers."
# Megatron's linear layers have extra state, which is None, and a strict load requires it.
_LINEAR_WEIGHT = re.compile(rf"({re.escape(LAYERS)}.*\.linear_\w+)\.weight")
# Returns a tensor by name, or the given layer of a stacked tensor.
Produce = Callable[[str, int | None], Tensor]


class Weights:
    """The weights in a checkpoint: names, shapes and dtypes are read at once, values one at a time."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.shapes = read_shapes(checkpoint)
        allow_plain_pickles_only()
        entries: dict[str, Any] = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
        self._entries: dict[str, TensorStorageMetadata] = {name: entries[name] for name in self.shapes}
        self.dtypes = {name: entry.properties.dtype for name, entry in self._entries.items()}

    def read(self, name: str, layer: int | None = None) -> Tensor:
        """Return the tensor `name`, on the CPU, or only `layer` of a stacked one, without the layer axis."""
        offsets, shape = [0] * len(self.shapes[name]), list(self.shapes[name])
        if layer is not None:
            assert 0 <= layer < shape[0]
            offsets[0], shape[0] = layer, 1
        tensor = torch.empty(shape, dtype=self.dtypes[name])
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(shape))
        items = create_read_items_for_chunk_list(name, self._entries[name], [chunk])
        with _single_process():
            planner = _ReadPlanner(items, tensor)
            load({name: tensor}, storage_reader=FileSystemReader(self.checkpoint), planner=planner, no_dist=True)
        return tensor if layer is None else tensor[0]


def write_weights(
    target: Path,
    tensors: Mapping[str, tuple[Shape, torch.dtype]],
    produce: Produce,
    record: dict[str, Any],
    common: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint of `tensors` to the new folder `target`, calling `produce` for one at a time.

    common: what the checkpoint contains besides tensors. `record` is passed to `seal_checkpoint`. `target` appears only
    when all of it is written. Raises what `produce` raises, and OSError if the disk is full.
    """
    with making(target) as temporary, _writing_errors(target):
        with _single_process():
            save({}, storage_writer=_Writer(temporary), planner=_WritePlanner(tensors, produce), no_dist=True)
        torch.save(dict(common or {}), temporary / "common.pt")
        write_json(temporary / "metadata.json", _BACKENDS)
        seal_checkpoint(temporary, record)


class _ReadPlanner(DefaultLoadPlanner):
    """Reads the stored parts given by `items` into one tensor."""

    def __init__(self, items: list[ReadItem], tensor: Tensor) -> None:
        super().__init__()
        self._items, self._tensor = items, tensor

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan(self._items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._tensor


class _WritePlanner(DefaultSavePlanner):
    """Writes lazily produced tensors, one chunk per layer of a stacked one, and extra state, as Megatron does."""

    def __init__(self, tensors: Mapping[str, tuple[Shape, torch.dtype]], produce: Produce) -> None:
        # Megatron does not support flattened lists.
        super().__init__(flatten_state_dict=False)
        self._tensors, self._produce = tensors, produce

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, (shape, dtype) in self._tensors.items():
            parts = range(shape[0]) if name.startswith(LAYERS) else (None,)
            for layer in parts:
                offsets = torch.Size([layer or 0] + [0] * (len(shape) - 1))
                sizes = torch.Size(shape if layer is None else (1, *shape[1:]))
                data = TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets, sizes),
                    properties=TensorProperties(dtype=dtype),
                    size=torch.Size(shape),
                )
                items.append(WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data))
            if linear := _LINEAR_WEIGHT.fullmatch(name):
                states = [f"{linear[1]}._extra_state/shard_{layer}_{shape[0]}" for layer in parts]
                items += [WriteItem(MetadataIndex(state), WriteItemType.BYTE_IO) for state in states]
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            content = BytesIO()
            # Megatron puts objects in lists.
            torch.save([None], content)
            return content
        name, data = write_item.index.fqn, write_item.tensor_data
        assert data is not None
        assert write_item.index.offset is not None
        layer = write_item.index.offset[0] if name.startswith(LAYERS) else None
        tensor = self._produce(name, layer)
        if layer is not None:
            tensor = tensor[None]
        assert (tensor.shape, tensor.dtype) == (data.chunk.sizes, data.properties.dtype), name
        return tensor.contiguous()


class _Writer(FileSystemWriter):
    """Writes metadata that passes `check_pickles`: without the path object that torch would add."""

    def storage_meta(self) -> StorageMeta | None:
        """Return empty storage metadata."""
        return StorageMeta()


# The content of metadata.json that Megatron-Core writes for torch's distributed format.
_BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@contextmanager
def _writing_errors(target: Path) -> Iterator[None]:
    """Re-raise the error of `produce` unchanged, and torch's error for a full disk as an OSError."""
    try:
        yield
    except (CheckpointException, RuntimeError) as error:
        # The failure of the only process.
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        if isinstance(cause, ValueError):
            raise cause from None
        # The original error is in the context of the one raised on closing the file.
        reason, context = str(cause), cause.__context__
        while context is not None:
            reason, context = f"{reason} {context}", context.__context__
        raise disk_error(reason, target) or cause from None


@contextmanager
def _single_process() -> Iterator[None]:
    """Suppress torch's warning about running in a single process, which is intended."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
