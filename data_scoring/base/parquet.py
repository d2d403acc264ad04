"""Parquet files that carry the fingerprint of their inputs."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_scoring.base.files import writing

FINGERPRINT_KEY = b"reprise.fingerprint"


def parquet_fingerprint(path: Path) -> str | None:
    """Return the fingerprint stored in a results file, or None if there is no such file."""
    if not path.exists():
        return None
    metadata = pq.read_schema(path).metadata or {}
    return str(metadata.get(FINGERPRINT_KEY, b"").decode())


def write_parquet(path: Path, table: pa.Table, fingerprint: str) -> None:
    """Write `table` to `path` atomically, carrying `fingerprint`."""
    metadata = {**(table.schema.metadata or {}), FINGERPRINT_KEY: fingerprint.encode()}
    with writing(path) as temporary:
        pq.write_table(table.replace_schema_metadata(metadata), temporary)
