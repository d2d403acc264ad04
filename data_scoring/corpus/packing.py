"""Samples: cut from each source's text, assigned at random to places in shards; and the validation set."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_scoring.base.files import checksum, writing
from data_scoring.base.parquet import copy_row_groups
from data_scoring.corpus.indexed import write_index
from data_scoring.corpus.permutation import Permutation

_CHUNK_SAMPLES = 1 << 16
_SAMPLES = pa.schema(
    [
        pa.field("shard", pa.int32()),
        pa.field("sample", pa.int32()),
        pa.field("source", pa.dictionary(pa.int32(), pa.string())),
        pa.field("num_tokens", pa.int32()),
    ]
)
# The tables of samples number them with 32 bits.
_MOST_SAMPLES = 2**31 - 1


@dataclass(frozen=True)
class Stream:
    """A source's concatenated training (or validation) tokens, and the samples cut from them."""

    name: str
    num_tokens: int
    sample_length: int

    @property
    def num_samples(self) -> int:
        """Return the number of samples: all full ones, plus the rest if it predicts at least one token."""
        full, rest = divmod(self.num_tokens, self.sample_length)
        return full + (rest >= 2)

    def lengths(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the lengths in tokens of the samples `index`; only the last one may be shorter."""
        return np.minimum(self.sample_length, self.num_tokens - index * self.sample_length)


def pack_validation(texts: Sequence[Path], streams: Sequence[Stream], dtype: np.dtype, folder: Path) -> dict[str, Any]:
    """Write the validation samples source by source; return the validation set's manifest entry.

    `texts`: files of validation tokens, in order.
    """
    with writing(folder / "validation.bin") as temporary, temporary.open("wb") as file:
        for path in texts:
            with path.open("rb") as tokens:
                shutil.copyfileobj(tokens, file)
    counts = [stream.num_samples for stream in streams]
    starts = np.cumsum([0] + [stream.num_tokens for stream in streams])

    def chunks() -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        for stream, start in zip(streams, starts, strict=False):
            index = np.arange(stream.num_samples, dtype=np.int64)
            yield stream.lengths(index), (start + index * stream.sample_length) * dtype.itemsize

    with writing(folder / "validation.idx") as temporary:
        write_index(temporary, dtype, sum(counts), chunks())
    checksums = {ending: checksum(folder / f"validation{ending}") for ending in (".bin", ".idx")}
    sources = [{"name": stream.name, "num_samples": stream.num_samples} for stream in streams]
    return {
        "num_samples": sum(counts),
        "sources": sources,
        "parts": [{"prefix": "validation", "checksums": checksums}],
    }


class ShardAssignment:
    """The random assignment of samples (numbered across all streams) to places in shards, computed, not stored."""

    def __init__(self, streams: Sequence[Stream], num_shards: int, seed: int, num_held_out: int = 0) -> None:
        self.streams = streams
        self.sample_length = streams[0].sample_length
        self.num_shards = num_shards
        self.num_held_out = num_held_out
        self.starts = np.cumsum([0] + [stream.num_samples for stream in streams])
        self.permutation = Permutation(int(self.starts[-1]), seed)
        if self.permutation.size - num_held_out < num_shards:
            raise ValueError(
                f"corpus.sources: only {self.permutation.size - num_held_out} training samples of "
                f"{self.sample_length - 1} tokens for {num_shards} shards; add text, or lower corpus.seq_length"
            )
        if self.num_samples(0) > _MOST_SAMPLES:
            raise ValueError(
                f"corpus.num_shards: {num_shards} shards would have {self.num_samples(0):,} samples each, and "
                f"{_MOST_SAMPLES:,} can be numbered; raise it"
            )

    def num_samples(self, shard: int) -> int:
        """Return a shard's number of samples; shards differ by at most one."""
        return -(-(self.permutation.size - self.num_held_out - shard) // self.num_shards)

    def place(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the shards, and the places in them, of the samples `index`."""
        place = self.permutation.forward(index) - self.num_held_out
        return place % self.num_shards, place // self.num_shards

    def samples(self, shard: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
        """Yield (source numbers, sample numbers in the source's stream, lengths) of a shard's places, in order."""
        for start in range(0, self.num_samples(shard), _CHUNK_SAMPLES):
            places = np.arange(start, min(start + _CHUNK_SAMPLES, self.num_samples(shard)), dtype=np.int64)
            yield self.describe(self.num_held_out + places * self.num_shards + shard)

    def held_out(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
        """Yield the same for the held-out samples."""
        for start in range(0, self.num_held_out, _CHUNK_SAMPLES):
            yield self.describe(np.arange(start, min(start + _CHUNK_SAMPLES, self.num_held_out), dtype=np.int64))

    def describe(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return (source numbers, sample numbers in the source's stream, lengths) at permuted `positions`."""
        index = self.permutation.inverse(positions)
        source = np.searchsorted(self.starts, index, side="right") - 1
        within = index - self.starts[source]
        lengths = np.empty(len(index), np.int64)
        for number, stream in enumerate(self.streams):
            lengths[source == number] = stream.lengths(within[source == number])
        return source, within, lengths


@contextmanager
def write_samples(path: Path, streams: Sequence[Stream]) -> Iterator[Callable[..., None]]:
    """Yield a function that adds rows to the table of samples in `path`.

    It takes the shard, the number of the first sample, and of each sample the number of its source and its length in
    tokens.
    """
    names = pa.array([stream.name for stream in streams])
    with pq.ParquetWriter(path, _SAMPLES) as writer:

        def add(shard: int, first: int, source: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
            columns = [
                pa.array(np.full(len(source), shard, np.int32)),
                pa.array(np.arange(first, first + len(source), dtype=np.int32)),
                pa.DictionaryArray.from_arrays(source.astype(np.int32), names),
                pa.array((lengths - 1).astype(np.int32)),
            ]
            writer.write_batch(pa.record_batch(columns, schema=_SAMPLES))

        yield add


def join_samples(tables: Sequence[Path], path: Path) -> None:
    """Write the rows of several tables of samples to `path`, in order."""
    with writing(path) as temporary, pq.ParquetWriter(temporary, _SAMPLES) as writer:
        copy_row_groups(tables, writer)
