"""The mix: which samples a round trains on, in which order. An index over the shards; no token is copied."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_scoring.base.files import writing
from data_scoring.base.sql import bounded, literal, random_bits, writing_errors

# Small enough to decode in no time where training needs it, large enough to keep the file's footer small.
_ROW_GROUP = 1 << 16


def write_mix(
    path: Path, samples: str, seed: int, round_number: int, max_tokens: int | None = None, memory_gb: float = 4.0
) -> int:
    """Write the mix of the (shard, sample) rows that the SQL query `samples` yields, in a seeded random order.

    Returns their number. The order depends on the seed, the round and the samples alone, not on the rows' order.
    With `max_tokens`, the query yields num_tokens too, and the mix ends before the sample that would exceed it.
    Sorting takes `memory_gb` GB at most, and disk beyond that. Raises ValueError where there is no row, or not even the
    first sample stays within `max_tokens`.
    """
    place = random_bits(seed, round_number, "shard::int", "sample::int", literal("order"))
    query = f"select shard::int as shard, sample::int as sample from ({samples}) order by {place}, shard, sample"
    if max_tokens is not None:
        # A running sum holds all rows at once, where the plain order above goes to the file as it is sorted.
        query = f"""
            select shard, sample from (
                select shard::int as shard, sample::int as sample, {place} as place,
                    sum(num_tokens) over (order by {place}, shard, sample rows unbounded preceding) as total
                from ({samples}))
            where total <= {max_tokens} order by place, shard, sample"""
    with writing(path) as temporary, writing_errors(path), bounded(path.parent, memory_gb) as connection:
        connection.execute(f"copy ({query}) to {literal(temporary)} (format parquet, row_group_size {_ROW_GROUP})")
        count = int(pq.read_metadata(temporary).num_rows)
        if count == 0 and max_tokens is not None:
            field = "train.max_tokens" if round_number == 1 else "refine.max_tokens"
            raise ValueError(f"{field}: {max_tokens} is less than the mix's first sample has; raise it")
        if count == 0:
            raise ValueError(
                f"refine: no sample is left to train round {round_number} on; `select reason, count(*) from selection "
                "group by all` says why: relax min_tokens, max_rounds or what else it names, in a run of another name"
            )
    return count


class Mix:
    """A mix, opened for reading: rows are decoded a row group at a time, as training reaches them."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise ValueError(f"{path}: no such mix; run the stage before it, or `reprise run`")
        self._file = pq.ParquetFile(path)
        sizes = [self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])
        self._group = -1
        self._shards = self._samples = np.empty(0, np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the shards and the samples, [stop - start] each, at the places start..stop-1 of the order."""
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
