"""Training's output for the ledger: one row per step, each sample's loss when trained on, and validation losses."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_scoring.base.files import checksum
from data_scoring.base.live_rows import LiveRows
from data_scoring.base.parquet import parquet_fingerprint, read_parquet, write_parquet
from data_scoring.corpus.corpus import VALIDATION as VALIDATION_SHARD
from data_scoring.corpus.corpus import Corpus
from data_scoring.losses.seen_losses import list_seen_losses

STEPS = pa.schema(
    [
        ("step", pa.int32()),
        ("loss", pa.float32()),
        ("lr", pa.float32()),
        ("grad_norm", pa.float32()),
        ("num_samples", pa.int32()),
        ("num_tokens", pa.int64()),
        ("tokens_per_second", pa.float32()),
        ("seconds", pa.float64()),
        ("ended_at", pa.timestamp("us")),
    ]
)
VALIDATION = pa.schema(
    [("step", pa.int32()), ("source", pa.string()), ("loss", pa.float64()), ("num_tokens", pa.int64())]
)
_VALIDATION_SAMPLES = pa.schema(
    [("sample", pa.int32()), ("source", pa.string()), ("num_tokens", pa.int32()), ("loss", pa.float32())]
)
_SEEN = pa.schema([("step", pa.int32()), ("shard", pa.int32()), ("sample", pa.int32()), ("loss", pa.float32())])


class RowLog:
    """A Parquet file with a few rows per step, which one rank rewrites completely on each flush.

    Between flushes, the new rows are in a file beside it, for processes that follow training; see
    `data_scoring.base.live_rows`.

    Raises ValueError if it lacks rows of the steps up to `up_to_step`, from which training resumes: `digest` is what
    `flush` returned after that step, or None if a version before 0.9 saved the checkpoint.
    """

    def __init__(
        self, path: Path, schema: pa.Schema, fingerprint: str, up_to_step: int, digest: str | None = None
    ) -> None:
        self._path, self._schema, self._fingerprint = path, schema, fingerprint
        self._live = LiveRows(path, fingerprint)
        old = schema.empty_table()
        if up_to_step and parquet_fingerprint(path) == fingerprint:
            table = read_parquet(path)
            # Rows after the checkpoint that training resumes from will be recomputed.
            old = table.filter(pc.less_equal(table["step"], up_to_step))
        if digest is not None and _digest(old) != digest:
            raise _damaged(path, up_to_step)
        self._old = _with_columns(old, schema)
        self._new: list[dict[str, Any]] = []

    def append(self, row: dict[str, Any]) -> None:
        """Add a row, to be written by the next flush."""
        self._new.append(row)
        # In the types of the file, so that a number is the same in both.
        self._live.append(pa.Table.from_pylist([row], self._schema).to_pylist()[0])

    @property
    def written(self) -> pa.Table:
        """Return the rows up to the last flush."""
        return self._old

    def flush(self) -> str:
        """Return a digest of all rows, after writing them."""
        self._old = pa.concat_tables([self._old, pa.Table.from_pylist(self._new, self._schema)])
        self._new = []
        write_parquet(self._path, self._old, self._fingerprint)
        self._live.clear()
        return _digest(self._old)


def training_seconds(steps: pa.Table) -> float:
    """Return the seconds of a round's training up to its last step.

    steps: rows of steps.parquet. Of steps that a version before 0.12 wrote, only the time of the steps themselves is
    known, from their speed.
    """
    known = [seconds for seconds in steps["seconds"].to_pylist() if seconds is not None]
    return (
        known[-1] if known else float(pc.sum(pc.divide(steps["num_tokens"], steps["tokens_per_second"])).as_py() or 0)
    )


def _with_columns(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return `table` with the columns of `schema`; those that an earlier version did not write are null."""
    columns = [
        table[field.name] if field.name in table.column_names else pa.nulls(len(table), field.type) for field in schema
    ]
    return pa.table(columns, names=schema.names).cast(schema)


def _digest(table: pa.Table) -> str:
    """Return a digest of a table's values, which does not depend on how they are stored."""
    digest = hashlib.blake2b(digest_size=16)
    for column in table.columns:
        values = column.to_pylist() if column.type == pa.string() else column.to_numpy()
        digest.update("\0".join(values).encode() if isinstance(values, list) else values.tobytes())
    return digest.hexdigest()


def _damaged(path: Path, step: int) -> ValueError:
    return ValueError(
        f"{path}: damaged or missing: it does not hold what training wrote until step {step}, from which it would "
        f"resume; restore it from a copy, or delete {path.parent if path.suffix == '.parquet' else path} to train the "
        "round again"
    )


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

    def flush(self) -> dict[str, str]:
        """Return the checksum of the file that holds the rows added since the last flush, by its name; {} if none."""
        if not self._columns:
            return {}
        columns = [np.concatenate(parts) for parts in zip(*self._columns, strict=True)]
        first = int(columns[0][0])
        arrays = [
            pa.array(column.astype(field.type.to_pandas_dtype())) for column, field in zip(columns, _SEEN, strict=True)
        ]
        path = self._folder / f"step={first:08d}-replica={self._replica:04d}.parquet"
        write_parquet(path, pa.table(arrays, schema=_SEEN), self._fingerprint)
        self._columns = []
        return {path.name: checksum(path)}


def validation_samples_path(round_folder: Path) -> Path:
    """Return the path of the losses of validation samples at the end of a round; older versions did not write them."""
    return round_folder / "validation-samples.parquet"


def write_validation_samples(path: Path, corpus: Corpus, losses: NDArray[np.float32], fingerprint: str) -> None:
    """Write the losses of the validation samples, [n] nats per token, with their sources and lengths."""
    columns = [
        np.arange(len(losses), dtype=np.int32),
        corpus.validation_sources,
        corpus.lengths(VALIDATION_SHARD).astype(np.int32),
        losses,
    ]
    write_parquet(path, pa.table(list(map(pa.array, columns)), schema=_VALIDATION_SAMPLES), fingerprint)


def prepare_seen(round_folder: Path, step: int, checksums: dict[str, str] | None) -> None:
    """Delete the seen losses of steps after `step`, which will be repeated.

    Raises ValueError if a file of the earlier steps, whose `checksums` are given, is damaged or missing.
    """
    for path in list_seen_losses(round_folder):
        if int(path.name.split("=")[1].split("-")[0]) > step or (checksums is not None and path.name not in checksums):
            path.unlink()
    for name, expected in (checksums or {}).items():
        path = round_folder / "seen" / name
        if not path.exists() or checksum(path) != expected:
            raise _damaged(path, step)
