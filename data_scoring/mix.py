"""The mix: which samples a round trains on, in which order. An index over the shards; no token is copied."""

from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_scoring.files import writing
from data_scoring.sql import literal, random_bits, writing_errors

# Small enough to decode in no time where training needs it, large enough to keep the file's footer small.
_ROW_GROUP = 1 << 16


def write_mix(path: Path, samples: str, seed: int, round_number: int) -> int:
    """Write the mix of the (shard, sample) rows that the SQL query `samples` yields, in a seeded random order.

    Returns their number. The order depends on the seed, the round and the samples alone, not on the rows' order.
    """
    with writing(path) as temporary, writing_errors(path), duckdb.connect() as connection:
        place = random_bits(seed, round_number, "shard::int", "sample::int", literal("order"))
        connection.execute(
            f"copy (select shard::int as shard, sample::int as sample from ({samples}) "
            f"order by {place}, shard, sample) to {literal(temporary)} (format parquet, row_group_size {_ROW_GROUP})"
        )
    return int(pq.read_metadata(path).num_rows)


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
