"""Bad records of a source, which were skipped: those of its parts, with their places in the whole files."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_scoring.base.files import writing
from data_scoring.config import SourceConfig
from data_scoring.corpus.source_parts import SourcePart
from data_scoring.corpus.tokenise import StagedPart, UnencodableDocumentError


def named_by_source(error: UnencodableDocumentError, source: SourceConfig, read: int) -> ValueError:
    """Return the error for a document of a part, before which the source has `read` documents."""
    return ValueError(
        f"corpus.sources.{source.name}: document {read + error.number} of {source.path!r}: {error.reason}, or set "
        "corpus.on_bad_record: skip"
    )


def lines_before(source: Sequence[SourcePart], staged: Sequence[StagedPart]) -> Iterator[int]:
    """Yield how many lines or paragraphs are before each part of a source in its file, if it is a stretch of one."""
    lines = 0
    for part, each in zip(source, staged, strict=True):
        lines = lines if part.pieces[0].start else 0
        yield lines
        lines += each.counts["num_lines"]


def skipped_records(source: Sequence[SourcePart], staged: Sequence[StagedPart]) -> Iterator[dict[str, Any]]:
    """Yield the bad records of a source that were skipped: file, line and reason."""
    read = 0
    for part, each, lines in zip(source, staged, lines_before(source, staged), strict=True):
        for record in _read(each.path("rejects.jsonl")):
            yield {**record, "line": lines + record["line"]}
        for record in _read(each.path("unencodable.jsonl")):
            number = read + record["number"]
            yield {"file": part.source.path, "line": number, "reason": f"document {number}: {record['reason']}"}
        read += each.counts["read"]


def list_records(records: Iterable[dict[str, Any]], path: Path) -> None:
    """Write bad records to `path`, one a line."""
    with writing(path) as temporary, temporary.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _read(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        with path.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)
