"""Parquet files that carry the fingerprint of their inputs, and checksums of their pages."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_scoring.base.files import writing

FINGERPRINT_KEY = b"reprise.fingerprint"


def parquet_fingerprint(path: Path) -> str | None:
    """Return the fingerprint stored in a results file, or None if there is no such file.

    Raises ValueError if the file cannot be read.
    """
    if not path.exists():
        return None
    try:
        metadata = pq.read_schema(path).metadata or {}
        return str(metadata.get(FINGERPRINT_KEY, b"").decode())
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise damaged(path, error) from None


def is_intact(path: Path, fingerprint: str) -> bool:
    """Return whether `path` carries `fingerprint` and its pages are as they were written; reads the whole file."""
    if not path.exists():
        return False
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            stored = (file.schema_arrow.metadata or {}).get(FINGERPRINT_KEY, b"")
            if stored != fingerprint.encode():
                return False
            for _ in file.iter_batches():
                pass
    except (pa.ArrowException, OSError):
        return False
    return True


def read_parquet(path: Path) -> pa.Table:
    """Return the table in a results file, without metadata. Raises ValueError if it is damaged or missing."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            return file.read().replace_schema_metadata(None)
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, error) from None


def damaged(path: Path, error: Exception) -> ValueError:
    """Return the error for a results file that cannot be read because of `error`."""
    reason = " ".join(str(error).split())[:200]
    return ValueError(f"{path}: damaged or missing ({reason}); restore it from a copy, or delete it and run again")


def write_parquet(path: Path, table: pa.Table, fingerprint: str) -> None:
    """Write `table` to `path` atomically, carrying `fingerprint`."""
    with open_writer(path, table.schema, fingerprint) as writer:
        writer.write_table(table)


def copy_row_groups(tables: Iterable[Path], writer: pq.ParquetWriter) -> None:
    """Write the row groups of several Parquet files, which have the schema of `writer`, one after another."""
    for table in tables:
        with pq.ParquetFile(table) as file:
            for group in range(file.num_row_groups):
                writer.write_table(file.read_row_group(group))


@contextmanager
def open_writer(path: Path, schema: pa.Schema, fingerprint: str) -> Iterator[pq.ParquetWriter]:
    """Yield a writer of tables to `path`; on success the file is complete, and carries `fingerprint`."""
    metadata = {**(schema.metadata or {}), FINGERPRINT_KEY: fingerprint.encode()}
    with (
        writing(path) as temporary,
        pq.ParquetWriter(temporary, schema.with_metadata(metadata), write_page_checksum=True) as writer,
    ):
        yield writer
