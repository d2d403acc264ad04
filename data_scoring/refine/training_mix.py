"""The mix: the samples that a round trains on, in training order. An index into the shards; no tokens are copied."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_scoring.base.files import writing
from data_scoring.base.sql import bounded, copy_to_parquet, literal, random_bits, writing_errors

# Small enough to decode quickly during training, large enough to keep the file's footer small.
_ROW_GROUP = 1 << 16


def write_mix(
    path: Path, samples: str, seed: int, round_number: int, max_tokens: int | None = None, memory_gb: float = 4.0
) -> int:
    """Return the number of samples, after writing the (shard, sample) rows of the query `samples` in random order.

    The order depends only on the seed, the round and the samples, not on the rows' order. With `max_tokens`, the query
    also has num_tokens, and the mix ends before the sample that would exceed the limit. Sorting takes at most
    `memory_gb` GB, and disk beyond that. Raises ValueError if there are no rows, or if the first sample exceeds
    `max_tokens`.
    """
    place = random_bits(seed, round_number, "shard::int", "sample::int", literal("order"))
    query = f"select shard::int as shard, sample::int as sample from ({samples}) order by {place}, shard, sample"
    if max_tokens is not None:
        # Only with a limit, since the running sum holds all rows in memory; the plain sort above streams to the file.
        query = f"""
            select shard, sample from (
                select shard::int as shard, sample::int as sample, {place} as place,
                    sum(num_tokens) over (order by {place}, shard, sample rows unbounded preceding) as total
                from ({samples}))
            where total <= {max_tokens} order by place, shard, sample"""
    with writing(path) as temporary, writing_errors(path), bounded(path.parent, memory_gb) as connection:
        connection.execute(copy_to_parquet(query, temporary, f"row_group_size {_ROW_GROUP}"))
        count = int(pq.read_metadata(temporary).num_rows)
        if count == 0 and max_tokens is not None:
            field = "train.max_tokens" if round_number == 1 else "refine.max_tokens"
            raise ValueError(f"{field}: {max_tokens} is less than the tokens of the mix's first sample; raise it")
        if count == 0:
            raise ValueError(
                f"refine: no sample is left to train round {round_number} on; `select reason, count(*) from selection "
                "group by all` shows why; relax min_tokens, max_rounds or another reason, in a run with another name"
            )
    return count


class Mix:
    """A mix, opened for reading: row groups are decoded one at a time, when training reaches them."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise ValueError(f"{path}: no such mix; run the previous stage, or `reprise run`")
        self._file = pq.ParquetFile(path)
        sizes = [self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])
        self._group = -1
        self._shards = self._samples = np.empty(0, np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the shards and the samples, [stop - start] int64 each, at positions start to stop - 1 of the order."""
        shards, samples = [], []
        while start < stop:
            group = int(np.searchsorted(self._starts, start, side="right")) - 1
            if group != self._group:
                table = self._file.read_row_group(group)
                self._shards, self._samples = (table[name].to_numpy().astype(np.int64) for name in ("shard", "sample"))
                self._group = group
            offset = int(self._starts[group])
            end = min(stop, int(self._starts[group + 1]))
            shards.append(self._shards[start - offset : end - offset])
            samples.append(self._samples[start - offset : end - offset])
            start = end
        return np.concatenate(shards), np.concatenate(samples)
