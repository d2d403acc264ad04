"""Tokenising sources: each document once, in order, into staging files in the corpus folder."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import TypedDict

from data_scoring.base.field_types import Count
from data_scoring.base.files import checksum, write_record, writing
from data_scoring.base.progress import Progress
from data_scoring.base.read_ahead import read_ahead
from data_scoring.base.validation import read_record
from data_scoring.corpus.documents import Document
from data_scoring.corpus.indexed import token_dtype
from data_scoring.corpus.source_text import SourceText
from data_scoring.corpus.sources import batch_documents
from data_scoring.tokenizer.tokenizer import Tokenizer, UnencodableTextError, encode_each

# One row per document. Documents are distinguished by 64 bits of BLAKE2b: among a billion documents, the probability
# of any collision is below 3 %. `file` is an index of the source's files, `number` that of the document in its file.
DOCUMENT = np.dtype(
    [("digest", "<u8"), ("num_tokens", "<i4"), ("num_bytes", "<i8"), ("file", "<i4"), ("number", "<i8")]
)
# Version of the staged files; those of another version are made again.
STAGING_FORMAT = 4

_CHUNK_DOCUMENTS = 1 << 14
# More than this is the wrong tokenizer for the text.
_LARGEST_LOST_SHARE = 0.1
# The most lost characters to name.
_NUM_EXAMPLES = 20


@dataclass(frozen=True)
class StagedSource:
    """A tokenised source: the concatenated tokens of its documents, a row for each document, and their files' names."""

    name: str
    tokens_path: Path
    documents_path: Path
    files_path: Path
    counts: dict[str, Any]

    def documents(self) -> Iterator[np.ndarray]:
        """Yield arrays of the documents' rows (dtype `DOCUMENT`), of bounded length."""
        with self.documents_path.open("rb") as file:
            while len(rows := np.fromfile(file, DOCUMENT, _CHUNK_DOCUMENTS)):
                yield rows

    def files(self) -> list[str]:
        """Return the names of the documents' files."""
        return [json.loads(line) for line in self.files_path.read_bytes().splitlines()]


class _Record(TypedDict, total=False):
    fingerprint: str
    checksums: list[str | None]
    documents: Count
    empty: Count
    bytes: Count
    tokens: Count
    characters: Count
    lost_characters: Count
    lost_examples: str
    rejected: Count


def stage_source(text: SourceText, tokenizer: Tokenizer, fingerprint: str, progress: Progress) -> StagedSource:
    """Return the tokenised source of `text`; finished work with the same `fingerprint` is reused.

    Raises ValueError if a document cannot be tokenised, unless bad records are skipped, and if too many characters are
    lost.
    """
    name, staging = text.source.name, text.staging
    record_path = staging / f"{name}.json"
    staged = (staging / f"{name}.tokens", staging / f"{name}.documents", staging / f"{name}.files")
    record: Mapping[str, Any] | None = read_record(record_path, _Record)
    if record is None or record.get("fingerprint") != fingerprint or _checksums(staged) != record.get("checksums"):
        with writing(staged[0]) as tokens_file, writing(staged[1]) as documents_file, writing(staged[2]) as files_file:
            counts = _tokenise(text, tokenizer, (tokens_file, documents_file, files_file), progress)
            _check_lost(text, counts)
        checksums = _checksums(staged)
        record = {"fingerprint": fingerprint, "checksums": checksums, **counts, "rejected": text.num_rejected()}
        write_record(record_path, record)
    text.forget()
    counts = {key: value for key, value in record.items() if key not in ("fingerprint", "checksums")}
    return StagedSource(name, *staged, counts)


def _checksums(paths: Iterable[Path]) -> list[str | None]:
    return [checksum(path) if path.exists() else None for path in paths]


def _tokenise(
    text: SourceText, tokenizer: Tokenizer, staged: tuple[Path, Path, Path], progress: Progress
) -> dict[str, Any]:
    dtype = token_dtype(tokenizer.vocab_size)
    counts = {"documents": 0, "empty": 0, "bytes": 0, "tokens": 0, "characters": 0, "lost_characters": 0}
    examples: dict[str, None] = {}
    num_read, num_files, last_file = 0, 0, None
    tokens_path, documents_path, files_path = staged
    with (
        tokens_path.open("wb") as tokens_file,
        documents_path.open("wb") as documents_file,
        files_path.open("w") as files,
    ):
        for batch in read_ahead(batch_documents(text.documents())):
            numbered = {number: each for number, each in enumerate(batch, start=num_read + 1) if each.text.strip()}
            num_read += len(batch)
            counts["empty"] += len(batch) - len(numbered)
            documents, encoded = _encode(text, numbered, tokenizer)
            rows = np.empty(len(documents), DOCUMENT)
            for row, (each, ids) in enumerate(zip(documents, encoded, strict=True)):
                raw = each.text.encode()
                digest = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")
                if each.file != last_file:
                    files.write(json.dumps(each.file) + "\n")
                    num_files, last_file = num_files + 1, each.file
                rows[row] = (digest, len(ids) + 1, len(raw), num_files - 1, each.number)
                counts["bytes"] += len(raw)
                counts["characters"] += len(each.text)
                tokens_file.write(np.asarray([*ids, tokenizer.end_of_document], dtype).tobytes())
            documents_file.write(rows.tobytes())
            for lost in tokenizer.find_lost([each.text for each in documents], encoded):
                counts["lost_characters"] += len(lost)
                if len(examples) < _NUM_EXAMPLES:
                    examples |= dict.fromkeys(lost)
            counts["documents"] += len(documents)
            counts["tokens"] += int(rows["num_tokens"].sum())
            progress(f"tokenising {text.source.name} (documents)", counts["documents"], None)
    return {**counts, "lost_examples": "".join([*examples][:_NUM_EXAMPLES])}


def _encode(
    text: SourceText, numbered: dict[int, Document], tokenizer: Tokenizer
) -> tuple[list[Document], list[list[int]]]:
    """Return the documents that can be encoded, and the ids of each; the others become bad records."""
    documents, encoded = [], []
    every = encode_each(tokenizer, [document.text for document in numbered.values()])
    for (number, document), ids in zip(numbered.items(), every, strict=True):
        if isinstance(ids, UnencodableTextError):
            text.reject(number, str(ids))
        else:
            documents.append(document)
            encoded.append(ids)
    return documents, encoded


def _check_lost(text: SourceText, counts: dict[str, Any]) -> None:
    lost, characters = counts["lost_characters"], counts["characters"]
    if lost > _LARGEST_LOST_SHARE * characters:
        raise ValueError(
            f"corpus.sources.{text.source.name}: the tokenizer cannot represent {lost:,} of its {characters:,} "
            f"characters, more than {_LARGEST_LOST_SHARE:.0%}, such as {counts['lost_examples']!r}; "
            "give a tokenizer for this text (tokenizer.path), or none to train one"
        )
