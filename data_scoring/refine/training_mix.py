"""The mix: the samples that a round trains on, in training order. An index into the shards; no tokens are copied."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_scoring.base.files import writing
from data_scoring.base.sql import bounded, copy_to_parquet, literal, random_bits, writing_errors

if TYPE_CHECKING:
    import duckdb

# Small enough to decode quickly during training, large enough to keep the file's footer small.
_ROW_GROUP = 1 << 16


@dataclass(frozen=True)
class MixOptions:
    """How a mix is written.

    max_tokens: the query also has num_tokens, and the mix ends before the sample that would exceed the limit.
    memory_gb: memory for sorting, GB, before it takes disk.
    batch_size: the query also has `batch`, a bigint, and samples of a batch stay together; batches of fewer samples
        than this come last, so that those before them are the steps of training with this batch size.
    is_weighted: the query also has `weight`, above 0. The mix gets weights in these proportions, with a mean of 1.
    max_weight: the weights that exceed it are set to it, and the others scaled up.
    is_by_source: the query also has `place`, an integer; samples are in its order, those of one place in random order.
    """

    max_tokens: int | None = None
    memory_gb: float = 4.0
    batch_size: int | None = None
    is_weighted: bool = False
    max_weight: float | None = None
    is_by_source: bool = False


_PLAIN = MixOptions()


def write_mix(path: Path, samples: str, seed: int, round_number: int, options: MixOptions = _PLAIN) -> int:
    """Return the number of samples, after writing the (shard, sample) rows of the query `samples` in random order.

    The order depends only on the seed, the round and the samples, not on the rows' order. Raises ValueError if there
    are no rows, or if the first sample exceeds `max_tokens`.
    """
    samples = f"select * replace (shard::int as shard, sample::int as sample) from ({samples})"
    place = f"{random_bits(seed, round_number, 'shard', 'sample', literal('order'))}, shard, sample"
    if options.batch_size is not None:
        samples = f"select *, count(*) over (partition by batch) < {options.batch_size} as is_short from ({samples})"
        place = f"is_short, {random_bits(seed, round_number, 'batch', literal('order'))}, batch, shard, sample"
    if options.is_by_source:
        place = f"place, {place}"
    columns = "shard, sample, weight" if options.is_weighted else "shard, sample"
    query = f"select {columns} from ({samples}) order by {place}"
    if options.max_tokens is not None:
        # Only with a limit, since the running sum holds all rows in memory; the plain sort above streams to the file.
        total = f"sum(num_tokens) over (order by {place} rows unbounded preceding)"
        query = f"""select {columns} from (select *, {total} as total from ({samples}))
            where total <= {options.max_tokens} order by {place}"""
    with (
        writing(path) as temporary,
        writing_errors(path),
        bounded(path.parent, options.memory_gb) as connection,
    ):
        if options.is_weighted:
            query = _normalise(connection, query, options.max_weight)
        connection.execute(copy_to_parquet(query, temporary, f"row_group_size {_ROW_GROUP}"))
        count = int(pq.read_metadata(temporary).num_rows)
        if count == 0 and options.max_tokens is not None:
            field = "train.max_tokens" if round_number == 1 else "refine.max_tokens"
            raise ValueError(
                f"{field}: {options.max_tokens} is less than the tokens of the mix's first sample; raise it"
            )
        if count == 0:
            raise ValueError(
                f"refine: no sample is left to train round {round_number} on; `select reason, count(*) from selection "
                "group by all` shows why; relax min_tokens, max_rounds or another reason, in a run with another name"
            )
    return count


def _normalise(connection: "duckdb.DuckDBPyConnection", query: str, max_weight: float | None) -> str:
    """Return the SQL of the rows of `query` with their weights as in `MixOptions`."""
    connection.execute(f"create temp table mixed as {query}")
    limit = "'inf'::double" if max_weight is None else f"{max_weight!r}::double"
    scale, num_clipped = 0.0, -1
    # Each scan finds more weights that exceed the limit, and scales the others up to make good for them.
    while True:
        [(count, clipped, rest)] = connection.sql(
            f"""select count(*), count(*) filter (weight * {scale!r}::double >= {limit}),
                sum(weight) filter (weight * {scale!r}::double < {limit}) from mixed"""
        ).fetchall()
        if clipped == num_clipped or not rest:
            return f"select shard, sample, least(weight * {scale!r}::double, {limit})::float as weight from mixed"
        num_clipped, scale = clipped, (count - clipped * (max_weight or 0.0)) / rest


class Mix:
    """A mix, opened for reading: row groups are decoded one at a time, when training reaches them."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise ValueError(f"{path}: no such mix; run the previous stage, or `reprise run`")
        self._file = pq.ParquetFile(path)
        sizes = [self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])
        self.is_weighted = "weight" in self._file.schema_arrow.names
        self._group = -1
        self._columns: dict[str, NDArray[Any]] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the shards and the samples, [stop - start] int64 each, at positions start to stop - 1 of the order."""
        shards, samples = self._read(start, stop, "shard"), self._read(start, stop, "sample")
        return shards.astype(np.int64), samples.astype(np.int64)

    def read_weights(self, start: int, stop: int) -> NDArray[np.float32] | None:
        """Return the weights of the samples' losses, [stop - start] float32, or None if the mix has none."""
        return self._read(start, stop, "weight").astype(np.float32) if self.is_weighted else None

    def _read(self, start: int, stop: int, column: str) -> NDArray[Any]:
        parts = []
        while start < stop:
            group = int(np.searchsorted(self._starts, start, side="right")) - 1
            if group != self._group:
                table = self._file.read_row_group(group)
                self._columns = {name: table[name].to_numpy() for name in table.column_names}
                self._group = group
            offset = int(self._starts[group])
            end = min(stop, int(self._starts[group + 1]))
            parts.append(self._columns[column][start - offset : end - offset])
            start = end
        return np.concatenate(parts)
