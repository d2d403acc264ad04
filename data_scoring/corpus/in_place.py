"""An existing Megatron corpus used in place: each shard is a new index file over its `.bin` files."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_scoring.base.files import checksum, writing
from data_scoring.corpus.indexed import IndexedTokens, open_indexed, write_index
from data_scoring.corpus.packing import ShardAssignment, Stream

_Described = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def assign_in_place(
    prefixes: list[tuple[str, Path]], sample_length: int, validation_fraction: float, num_shards: int, seed: int
) -> tuple[ShardAssignment, list[IndexedTokens]]:
    """Return the assignment of samples, windows of `sample_length` tokens over each (name, prefix), and the corpora.

    Windows rather than documents are held out, and duplicates stay: dropping a document would mean copying the tokens.
    """
    corpora = [open_indexed(prefix) for _, prefix in prefixes]
    streams = [
        Stream(name, int(corpus.lengths.sum(dtype=np.int64)), sample_length)
        for (name, _), corpus in zip(prefixes, corpora, strict=True)
    ]
    total = sum(stream.num_samples for stream in streams)
    return ShardAssignment(streams, num_shards, seed, max(1, round(total * validation_fraction))), corpora


def index_in_place(
    assignment: ShardAssignment, corpora: list[IndexedTokens], folder: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Write one index file per source for each shard; return the manifest entries of validation set and shards."""
    validation = _index_parts("validation", assignment.held_out, assignment, corpora, folder)
    shards = []
    for shard in range(assignment.num_shards):
        entry = _index_parts(f"shard-{shard:04d}", partial(assignment.samples, shard), assignment, corpora, folder)
        shards.append({"num_samples": entry["num_samples"], "parts": entry["parts"]})
    return validation, shards


def _index_parts(
    name: str,
    describe: Callable[[], Iterator[_Described]],
    assignment: ShardAssignment,
    corpora: list[IndexedTokens],
    folder: Path,
) -> dict[str, Any]:
    parts, sources = [], []
    for number, (stream, corpus) in enumerate(zip(assignment.streams, corpora, strict=True)):
        count = sum(int((source == number).sum()) for source, _, _ in describe())
        itemsize = corpus.tokens.itemsize

        def chunks(
            number: int = number, stride: int = stream.sample_length * itemsize
        ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
            for source, within, lengths in describe():
                yield lengths[source == number], within[source == number] * stride

        prefix = f"{name}-{stream.name}"
        with writing(folder / f"{prefix}.idx") as temporary:
            write_index(temporary, corpus.tokens.dtype, count, chunks())
        with writing(folder / f"{prefix}.bin") as temporary:
            temporary.symlink_to(Path(f"{corpus.prefix}.bin").resolve())
        # Only the index gets a checksum: hashing the existing tokens would cost more than reading them.
        parts.append({"prefix": prefix, "checksums": {".idx": checksum(folder / f"{prefix}.idx")}})
        sources.append({"name": stream.name, "num_samples": count})
    return {"num_samples": sum(part["num_samples"] for part in sources), "sources": sources, "parts": parts}
