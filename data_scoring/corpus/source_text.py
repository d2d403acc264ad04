"""The text of one source, read and parsed once: text that trains a tokenizer is kept until it is tokenised."""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from data_scoring.base.files import checksum, fingerprint, write_record, writing
from data_scoring.base.validation import read_record
from data_scoring.config import SourceConfig
from data_scoring.corpus.documents import Document
from data_scoring.corpus.sources import Rejects, batch_documents, list_reject, locate_documents, stamp_files

# Version of the kept documents; those of another version are read again.
_FORMAT = 2
_SCHEMA = pa.schema(
    [pa.field("text", pa.large_string()), pa.field("file", pa.large_string()), pa.field("number", pa.int64())]
)


@dataclass(frozen=True)
class SourceText:
    """The documents of `source`, and their files in the folder `staging`.

    Kept documents are an Arrow stream, compressed with zstd, which is complete once the whole source was read. A record
    beside it has its checksum, and the fingerprint of the source's configuration and files: it is only valid for these.
    """

    source: SourceConfig
    staging: Path
    skip_bad: bool

    @property
    def identity(self) -> str:
        """Return the fingerprint of the documents: the source's configuration, and the current state of its files."""
        # Python's own text differs between versions.
        return fingerprint(self.source.model_dump(), stamp_files(self.source), self.skip_bad, sys.version, _FORMAT)

    def documents(self, keep: bool = False) -> Iterator[Document]:
        """Yield the documents: the kept ones, or else the source's; with `keep`, these are kept once all were read.

        Raises ValueError for a malformed record, unless bad records are skipped and listed in the staging folder.
        """
        if self._is_kept():
            yield from self._read_kept()
            return
        documents = locate_documents(self.source, Rejects(self._rejects_path, self.skip_bad))
        yield from self._keep(documents) if keep else documents

    def reject(self, number: int, reason: str) -> None:
        """List the document `number`, 1-based, among the bad records. Raises ValueError unless these are skipped."""
        where = f"corpus.sources.{self.source.name}"
        if not self.skip_bad:
            raise ValueError(
                f"{where}: document {number} of {self.source.path!r}: {reason}, or set corpus.on_bad_record: skip"
            )
        list_reject(self._rejects_path, self.source.path, number, f"document {number}: {reason}")

    def num_rejected(self) -> int:
        """Return the number of bad records that were skipped when the source was read and tokenised."""
        if not self._rejects_path.exists():
            return 0
        with self._rejects_path.open("rb") as lines:
            return sum(1 for _ in lines)

    def first_rejected(self) -> str | None:
        """Return file, line and reason of the first malformed record that was skipped, if there is one."""
        if self.num_rejected() == 0:
            return None
        with self._rejects_path.open(encoding="utf-8") as lines:
            first = json.loads(lines.readline())
        return f"{first['file']}:{first['line']}: {first['reason']}"

    def forget(self) -> None:
        """Delete the kept documents."""
        self._record_path.unlink(missing_ok=True)
        self._path.unlink(missing_ok=True)

    @property
    def _path(self) -> Path:
        return self.staging / f"{self.source.name}.text.arrow"

    @property
    def _record_path(self) -> Path:
        return self._path.with_suffix(".json")

    @property
    def _rejects_path(self) -> Path:
        return self.staging / f"{self.source.name}.rejects.jsonl"

    def _is_kept(self) -> bool:
        record = read_record(self._record_path, dict[str, str])
        if record is None or record.get("fingerprint") != self.identity or not self._path.exists():
            return False
        return checksum(self._path) == record.get("checksum")

    def _read_kept(self) -> Iterator[Document]:
        with pa.OSFile(str(self._path)) as file, pa.ipc.open_stream(file) as stream:
            for batch in stream:
                yield from map(Document, *(column.to_pylist() for column in batch.columns))

    def _keep(self, documents: Iterable[Document]) -> Iterator[Document]:
        identity, options = self.identity, pa.ipc.IpcWriteOptions(compression="zstd")
        with writing(self._path) as temporary, pa.ipc.new_stream(str(temporary), _SCHEMA, options=options) as stream:
            for batch in batch_documents(documents):
                columns = zip(*batch, strict=True)
                arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
                stream.write_batch(pa.record_batch(arrays, schema=_SCHEMA))
                yield from batch
        write_record(self._record_path, {"fingerprint": identity, "checksum": checksum(self._path)})
