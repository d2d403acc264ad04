"""Tokenising sources: each document once, in order, into staging files in the corpus folder."""

import hashlib
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
from data_scoring.corpus.indexed import token_dtype
from data_scoring.corpus.source_text import SourceText
from data_scoring.corpus.sources import batch_documents
from data_scoring.tokenizer.tokenizer import Tokenizer, UnencodableTextError, encode_each

# One row per document. Documents are distinguished by 64 bits of BLAKE2b: among a billion documents, the probability
# of any collision is below 3 %.
DOCUMENT = np.dtype([("digest", "<u8"), ("num_tokens", "<i4"), ("num_bytes", "<i8")])
# Version of the staged files; those of another version are made again.
STAGING_FORMAT = 3

_CHUNK_DOCUMENTS = 1 << 14
# More than this is the wrong tokenizer for the text.
_LARGEST_LOST_SHARE = 0.1
# The most lost characters to name.
_NUM_EXAMPLES = 20


@dataclass(frozen=True)
class StagedSource:
    """A tokenised source: the concatenated tokens of its documents, and a row for each document."""

    name: str
    tokens_path: Path
    documents_path: Path
    counts: dict[str, Any]

    def documents(self) -> Iterator[np.ndarray]:
        """Yield arrays of the documents' rows (dtype `DOCUMENT`), of bounded length."""
        with self.documents_path.open("rb") as file:
            while len(rows := np.fromfile(file, DOCUMENT, _CHUNK_DOCUMENTS)):
                yield rows


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
    staged = (staging / f"{name}.tokens", staging / f"{name}.documents")
    tokens_path, documents_path = staged
    record: Mapping[str, Any] | None = read_record(record_path, _Record)
    if record is None or record.get("fingerprint") != fingerprint or _checksums(staged) != record.get("checksums"):
        with writing(tokens_path) as tokens_file, writing(documents_path) as documents_file:
            counts = _tokenise(text, tokenizer, tokens_file, documents_file, progress)
            _check_lost(text, counts)
        checksums = _checksums(staged)
        record = {"fingerprint": fingerprint, "checksums": checksums, **counts, "rejected": text.num_rejected()}
        write_record(record_path, record)
    text.forget()
    counts = {key: value for key, value in record.items() if key not in ("fingerprint", "checksums")}
    return StagedSource(name, tokens_path, documents_path, counts)


def _checksums(paths: Iterable[Path]) -> list[str | None]:
    return [checksum(path) if path.exists() else None for path in paths]


def _tokenise(
    text: SourceText, tokenizer: Tokenizer, tokens_path: Path, documents_path: Path, progress: Progress
) -> dict[str, Any]:
    dtype = token_dtype(tokenizer.vocab_size)
    counts = {"documents": 0, "empty": 0, "bytes": 0, "tokens": 0, "characters": 0, "lost_characters": 0}
    examples: dict[str, None] = {}
    num_read = 0
    with tokens_path.open("wb") as tokens_file, documents_path.open("wb") as documents_file:
        for batch in read_ahead(batch_documents(text.documents())):
            numbered = {number: each for number, each in enumerate(batch, start=num_read + 1) if each.strip()}
            num_read += len(batch)
            counts["empty"] += len(batch) - len(numbered)
            texts, encoded = _encode(text, numbered, tokenizer)
            rows = np.empty(len(texts), DOCUMENT)
            for row, (each, ids) in enumerate(zip(texts, encoded, strict=True)):
                raw = each.encode()
                digest = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")
                rows[row] = (digest, len(ids) + 1, len(raw))
                counts["bytes"] += len(raw)
                counts["characters"] += len(each)
                tokens_file.write(np.asarray([*ids, tokenizer.end_of_document], dtype).tobytes())
            documents_file.write(rows.tobytes())
            for lost in tokenizer.find_lost(texts, encoded):
                counts["lost_characters"] += len(lost)
                if len(examples) < _NUM_EXAMPLES:
                    examples |= dict.fromkeys(lost)
            counts["documents"] += len(texts)
            counts["tokens"] += int(rows["num_tokens"].sum())
            progress(f"tokenising {text.source.name} (documents)", counts["documents"], None)
    return {**counts, "lost_examples": "".join([*examples][:_NUM_EXAMPLES])}


def _encode(text: SourceText, documents: dict[int, str], tokenizer: Tokenizer) -> tuple[list[str], list[list[int]]]:
    """Return the documents that can be encoded, and the ids of each; the others become bad records."""
    texts, encoded = [], []
    for (number, document), ids in zip(documents.items(), encode_each(tokenizer, [*documents.values()]), strict=True):
        if isinstance(ids, UnencodableTextError):
            text.reject(number, str(ids))
        else:
            texts.append(document)
            encoded.append(ids)
    return texts, encoded


def _check_lost(text: SourceText, counts: dict[str, Any]) -> None:
    lost, characters = counts["lost_characters"], counts["characters"]
    if lost > _LARGEST_LOST_SHARE * characters:
        raise ValueError(
            f"corpus.sources.{text.source.name}: the tokenizer cannot represent {lost:,} of its {characters:,} "
            f"characters, more than {_LARGEST_LOST_SHARE:.0%}, such as {counts['lost_examples']!r}; "
            "give a tokenizer for this text (tokenizer.path), or none to train one"
        )
