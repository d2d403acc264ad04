"""Training's output for the ledger: one row per step, each sample's loss when trained on, and validation losses."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_scoring.base.parquet import parquet_fingerprint, write_parquet

STEPS = pa.schema(
    [
        ("step", pa.int32()),
        ("loss", pa.float32()),
        ("lr", pa.float32()),
        ("grad_norm", pa.float32()),
        ("num_samples", pa.int32()),
        ("num_tokens", pa.int64()),
        ("tokens_per_second", pa.float32()),
    ]
)
VALIDATION = pa.schema(
    [("step", pa.int32()), ("source", pa.string()), ("loss", pa.float64()), ("num_tokens", pa.int64())]
)
_SEEN = pa.schema([("step", pa.int32()), ("shard", pa.int32()), ("sample", pa.int32()), ("loss", pa.float32())])


class RowLog:
    """A Parquet file with a few rows per step, which one rank rewrites completely on each flush."""

    def __init__(self, path: Path, schema: pa.Schema, fingerprint: str, up_to_step: int) -> None:
        self._path, self._schema, self._fingerprint = path, schema, fingerprint
        self._old = schema.empty_table()
        if parquet_fingerprint(path) == fingerprint:
            # Rows after the checkpoint that training resumes from will be recomputed.
            self._old = pq.read_table(path, filters=[("step", "<=", up_to_step)]).replace_schema_metadata(None)
        self._new: list[dict[str, Any]] = []

    def append(self, row: dict[str, Any]) -> None:
        """Add a row, to be written by the next flush."""
        self._new.append(row)

    def flush(self) -> None:
        """Write all rows."""
        self._old = pa.concat_tables([self._old, pa.Table.from_pylist(self._new, self._schema)])
        self._new = []
        write_parquet(self._path, self._old, self._fingerprint)


class SeenLog:
    """The losses of one replica's samples in the step that trained on them, with one file per checkpoint interval.

    A file is named after its first step, so that repeated steps replace their earlier files.
    """

    def __init__(self, folder: Path, replica: int, fingerprint: str) -> None:
        self._folder, self._replica, self._fingerprint = folder, replica, fingerprint
        self._columns: list[tuple[NDArray[Any], ...]] = []

    def append(
        self, step: int, shards: NDArray[np.int64], samples: NDArray[np.int64], losses: NDArray[np.float32]
    ) -> None:
        """Add one step's samples, [n] each."""
        self._columns.append((np.full(len(samples), step), shards, samples, losses))

    def flush(self) -> None:
        """Write the rows added since the last flush."""
        if not self._columns:
            return
        columns = [np.concatenate(parts) for parts in zip(*self._columns, strict=True)]
        first = int(columns[0][0])
        arrays = [
            pa.array(column.astype(field.type.to_pandas_dtype())) for column, field in zip(columns, _SEEN, strict=True)
        ]
        path = self._folder / f"step={first:08d}-replica={self._replica:04d}.parquet"
        write_parquet(path, pa.table(arrays, schema=_SEEN), self._fingerprint)
        self._columns = []


def remove_seen_after(folder: Path, step: int) -> None:
    """Delete the seen losses of steps after `step`, which will be repeated."""
    for path in folder.glob("step=*.parquet"):
        if int(path.name.split("=")[1].split("-")[0]) > step:
            path.unlink()
