"""The text of one part of a source: text that trains a tokenizer is read once, and kept until it is tokenised."""

import shutil
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from random import Random

import pyarrow as pa
from typing_extensions import TypedDict

from data_scoring.base.engine import Count
from data_scoring.base.field_types import Count as NumberOf
from data_scoring.base.files import checksum, fingerprint, write_record, writing
from data_scoring.base.validation import read_record
from data_scoring.corpus.documents import Document
from data_scoring.corpus.source_parts import SourcePart
from data_scoring.corpus.sources import (
    BadRecord,
    batch_documents,
    check_unchanged,
    count_before,
    list_reject,
    read_pieces,
    unit_of,
)
from data_scoring.tokenizer.tokenizer import TextSample

_SCHEMA = pa.schema(
    [pa.field("text", pa.large_string()), pa.field("file", pa.large_string()), pa.field("number", pa.int64())]
)
_SAMPLE = pa.schema([pa.field("key", pa.float64()), pa.field("text", pa.large_string())])
# Text that differs in how densely it is stored may have this many times the share of the sample that it has of bytes.
_DENSITY = 8
_SMALLEST_SAMPLE_BYTES = 1 << 20


class _Record(TypedDict):
    fingerprint: str
    sample: str
    checksums: list[str]
    num_lines: NumberOf


class PartText:
    """The documents of `part`, and their files in the folder `staging`.

    Kept documents are an Arrow stream, compressed with zstd; a record beside it has its checksum.

    num_lines: how many lines or paragraphs the part's last piece has; known once all documents were read.
    """

    def __init__(self, part: SourcePart, staging: Path, skip_bad: bool) -> None:
        self.part, self._skip_bad = part, skip_bad
        self._prefix = staging / part.name
        self.num_lines = 0

    @property
    def _kept(self) -> tuple[Path, Path, Path]:
        """Return the paths of the kept documents, of the bad records among them, and of the tokenizer's sample."""
        return (
            Path(f"{self._prefix}.text.arrow"),
            Path(f"{self._prefix}.text.rejects.jsonl"),
            Path(f"{self._prefix}.sample.arrow"),
        )

    @property
    def _record_path(self) -> Path:
        return Path(f"{self._prefix}.text.json")

    def documents(self, rejects: Path) -> Iterator[Document]:
        """Yield the documents: the kept ones, or else those of the source; list bad records in the file `rejects`.

        Raises ValueError for a malformed record, with its file and line, unless bad records are skipped.
        """
        record = self._valid_record()
        if record is None:
            yield from self._read(rejects)
            return
        shutil.copyfile(self._kept[1], rejects)
        self.num_lines = record["num_lines"]
        with pa.OSFile(str(self._kept[0])) as file, pa.ipc.open_stream(file) as stream:
            for batch in stream:
                yield from map(Document, *(column.to_pylist() for column in batch.columns))

    def keep(self, num_bytes: int, total_bytes: int, seed: int, count: Count) -> None:
        """Keep the documents, and a random sample of at most `num_bytes` of them, unless both are there.

        The sample is the part's of one of `num_bytes` from parts of `total_bytes` in all, and more than its share.
        """
        share = self.part.num_bytes / total_bytes if self.part.num_bytes else 1.0
        most = min(num_bytes, max(_SMALLEST_SAMPLE_BYTES, round(_DENSITY * share * num_bytes)))
        identity = fingerprint(most, seed)
        known = self._valid_record()
        if known is not None and known["sample"] == identity:
            return
        text_path, rejects_path, sample_path = self._kept
        sample, keys = TextSample(most), Random(f"{seed} {self.part.name}")  # noqa: S311
        with writing(text_path) as text, writing(rejects_path) as rejects, writing(sample_path) as sampled:
            rejects.touch()
            with pa.ipc.new_stream(str(text), _SCHEMA, options=pa.ipc.IpcWriteOptions(compression="zstd")) as stream:
                done = 0
                for batch in batch_documents(self._read(rejects)):
                    stream.write_batch(_batch(zip(*batch, strict=True), _SCHEMA))
                    for document in batch:
                        sample.add(keys.random(), document.text)
                    done += len(batch)
                    count(done)
            with pa.ipc.new_stream(str(sampled), _SAMPLE) as stream:
                for entry in sample.entries():
                    stream.write_batch(_batch(([value] for value in entry), _SAMPLE))
        record = {"checksums": [checksum(path) for path in self._kept], "num_lines": self.num_lines}
        write_record(self._record_path, {"fingerprint": self._identity, "sample": identity, **record})

    def sampled(self) -> Iterator[tuple[float, str]]:
        """Yield the keys and texts of the sample that `keep` kept, in the order of the documents."""
        with pa.OSFile(str(self._kept[2])) as file, pa.ipc.open_stream(file) as stream:
            for batch in stream:
                yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)

    def forget(self) -> None:
        """Delete what is kept."""
        self._record_path.unlink(missing_ok=True)
        for path in self._kept:
            path.unlink(missing_ok=True)

    @property
    def _identity(self) -> str:
        return fingerprint(self.part.identity, self._skip_bad)

    def _valid_record(self) -> _Record | None:
        """Return the record of what is kept, if it is of the same text and its files are as they were written."""
        record = read_record(self._record_path, _Record)
        if record is None or record["fingerprint"] != self._identity or not all(path.exists() for path in self._kept):
            return None
        return record if record["checksums"] == [checksum(path) for path in self._kept] else None

    def _read(self, rejects: Path) -> Iterator[Document]:
        source, part = self.part.source, self.part
        documents = read_pieces(source, part.kind, part.pieces, self._on_bad_record(rejects))
        if source.max_documents is None:
            self.num_lines = yield from documents
        else:
            yield from islice(documents, source.max_documents)
        check_unchanged(part)

    def _on_bad_record(self, rejects: Path) -> BadRecord:
        def handle(file: str, line: int, reason: str) -> None:
            if not self._skip_bad:
                raise ValueError(f"{file}:{line + self._lines_before()}: {reason}, or set corpus.on_bad_record: skip")
            list_reject(rejects, file, line, reason)

        return handle

    def _lines_before(self) -> int:
        """Return the number of lines or paragraphs before the part, if it is a stretch of a file of such."""
        piece = self.part.pieces[0]
        if piece.start == 0 or self.part.kind == "parquet":
            return 0
        return count_before(piece, unit_of(self.part.source, self.part.kind))


def _batch(columns: Iterable[Iterable[object]], schema: pa.Schema) -> pa.RecordBatch:
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.record_batch(arrays, schema=schema)
