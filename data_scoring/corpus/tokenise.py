"""Tokenising the parts of sources: each document once, in order, into staging files in the corpus folder."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from typing_extensions import TypedDict

from data_scoring.base.engine import Count
from data_scoring.base.field_types import Count as NumberOf
from data_scoring.base.files import checksum, fingerprint, write_record, writing
from data_scoring.base.read_ahead import read_ahead
from data_scoring.base.validation import read_record
from data_scoring.corpus.digests import write_digests
from data_scoring.corpus.documents import Document
from data_scoring.corpus.indexed import token_dtype
from data_scoring.corpus.part_text import PartText
from data_scoring.corpus.source_parts import SourcePart
from data_scoring.corpus.sources import batch_documents
from data_scoring.tokenizer.tokenizer import Tokenizer, UnencodableTextError, encode_each, open_tokenizer

# One row per document. Documents are distinguished by 64 bits of BLAKE2b: among a billion documents, the probability
# of any collision is below 3 %. `file` is an index of the part's files, `number` that of the document in its file, or
# in the part's stretch of it.
DOCUMENT = np.dtype(
    [("digest", "<u8"), ("num_tokens", "<i4"), ("num_bytes", "<i8"), ("file", "<i4"), ("number", "<i8")]
)
# Version of the staged files; those of another version are made again.
STAGING_FORMAT = 5
_ENDINGS = ("tokens", "documents", "files", "digests", "digest-bounds.npy", "rejects.jsonl", "unencodable.jsonl")

_CHUNK_DOCUMENTS = 1 << 14
# The most lost characters to name.
NUM_EXAMPLES = 20


@dataclass(frozen=True)
class StagedPart:
    """A tokenised part: the concatenated tokens of its documents, a row for each document, and their files' names.

    prefix: what the names of its files begin with. counts: of documents, bytes, tokens and the like.
    """

    source: str
    prefix: Path
    counts: Mapping[str, Any] = field(default_factory=dict)

    def path(self, ending: str) -> Path:
        """Return the path of one of the part's files."""
        return self.prefix.with_name(f"{self.prefix.name}.{ending}")

    def documents(self) -> Iterator[np.ndarray]:
        """Yield arrays of the documents' rows (dtype `DOCUMENT`), of bounded length."""
        with self.path("documents").open("rb") as file:
            while len(rows := np.fromfile(file, DOCUMENT, _CHUNK_DOCUMENTS)):
                yield rows

    def files(self) -> list[str]:
        """Return the names of the documents' files."""
        return [json.loads(line) for line in self.path("files").read_bytes().splitlines()]


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer to work with in other processes: its file, with its checksum, and its end-of-document token."""

    path: Path
    end_of_document: str | None
    checksum: str

    @property
    def identity(self) -> str:
        """Return what distinguishes the tokenizer from others, wherever it is."""
        return fingerprint(self.checksum, self.end_of_document)

    def open(self) -> Tokenizer:
        """Return the tokenizer, opened once in each process."""
        return _open(self)


@lru_cache(maxsize=2)
def _open(file: TokenizerFile) -> Tokenizer:
    return open_tokenizer(file.path, file.end_of_document)


class UnencodableDocumentError(ValueError):
    """The document `number` of a part, from 1, cannot be encoded for `reason`."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(number, reason)
        self.number, self.reason = number, reason


class _Record(TypedDict, total=False):
    fingerprint: str
    checksums: list[str]
    read: NumberOf
    documents: NumberOf
    empty: NumberOf
    bytes: NumberOf
    tokens: NumberOf
    characters: NumberOf
    lost_characters: NumberOf
    lost_examples: str
    rejected: NumberOf
    num_lines: NumberOf


def tokenise_part(part: SourcePart, count: Count, *, staging: Path, tokenizer: TokenizerFile, skip_bad: bool) -> dict:
    """Return the counts of a part, after tokenising it; finished work on the same text is reused.

    counts: `read` documents, of which `empty` ones are not staged; `documents`, their `bytes`, `characters` and
    `tokens`; `lost_characters` with the first `lost_examples`; `rejected` records and documents; `num_lines`: see
    `PartText`. Raises ValueError for a malformed record, and UnencodableDocumentError for a document that the tokenizer
    cannot encode, unless bad records are skipped.
    """
    text, staged = PartText(part, staging, skip_bad), StagedPart(part.source.name, staging / part.name, {})
    paths = [staged.path(ending) for ending in _ENDINGS]
    identity = fingerprint(part.identity, skip_bad, tokenizer.identity, STAGING_FORMAT)
    known: Mapping[str, Any] | None = read_record(staged.path("json"), _Record)
    if known is None or known.get("fingerprint") != identity or _checksums(paths) != known.get("checksums"):
        counts = _stage(text, tokenizer.open(), staged, skip_bad, count)
        known = {"fingerprint": identity, "checksums": _checksums(paths), **counts}
        write_record(staged.path("json"), known)
    text.forget()
    return {key: value for key, value in known.items() if key not in ("fingerprint", "checksums")}


def _checksums(paths: Iterable[Path]) -> list[str | None]:
    return [checksum(path) if path.exists() else None for path in paths]


def _stage(
    text: PartText, tokenizer: Tokenizer, staged: StagedPart, skip_bad: bool, count: Count
) -> dict[str, int | str]:
    with (
        writing(staged.path("tokens")) as tokens_path,
        writing(staged.path("documents")) as documents_path,
        writing(staged.path("files")) as files_path,
        writing(staged.path("rejects.jsonl")) as rejects_path,
        writing(staged.path("unencodable.jsonl")) as unencodable_path,
    ):
        rejects_path.touch()
        with (
            tokens_path.open("wb") as tokens,
            documents_path.open("wb") as documents,
            files_path.open("w", encoding="utf-8") as files,
            unencodable_path.open("w", encoding="utf-8") as unencodable,
        ):
            staging = _Staging(tokenizer, tokens, documents, files, None if not skip_bad else unencodable)
            for batch in read_ahead(batch_documents(text.documents(rejects_path))):
                staging.add(batch)
                count(staging.counts["documents"])
        rejected = sum(_count_lines(path) for path in (rejects_path, unencodable_path))
    write_digests(staged.documents(), staged.path("digests"), staged.path("digest-bounds.npy"))
    examples = "".join([*staging.examples][:NUM_EXAMPLES])
    return {**staging.counts, "lost_examples": examples, "rejected": rejected, "num_lines": text.num_lines}


def _count_lines(path: Path) -> int:
    with path.open("rb") as lines:
        return sum(1 for _ in lines)


class _Staging:
    """The open files of a part, and the counts of what was written to them.

    unencodable: lists the numbers of documents that cannot be encoded, with the reasons; None: raises at the first.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        tokens: IO[bytes],
        documents: IO[bytes],
        files: IO[str],
        unencodable: IO[str] | None,
    ) -> None:
        self._tokenizer, self._dtype = tokenizer, token_dtype(tokenizer.vocab_size)
        self._tokens, self._documents, self._files, self._unencodable = tokens, documents, files, unencodable
        self._num_files, self._last_file = 0, ""
        names = ("read", "documents", "empty", "bytes", "tokens", "characters", "lost_characters")
        self.counts: dict[str, int] = dict.fromkeys(names, 0)
        self.examples: dict[str, None] = {}

    def add(self, batch: list[Document]) -> None:
        """Tokenise and write the next documents."""
        counts = self.counts
        numbered = {number: each for number, each in enumerate(batch, start=counts["read"] + 1) if each.text.strip()}
        counts["read"] += len(batch)
        counts["empty"] += len(batch) - len(numbered)
        documents, encoded = self._encode(numbered)
        raws = [each.text.encode() for each in documents]
        rows = np.empty(len(documents), DOCUMENT)
        rows["digest"] = [int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little") for raw in raws]
        rows["num_tokens"] = [len(ids) + 1 for ids in encoded]
        rows["num_bytes"] = [len(raw) for raw in raws]
        rows["file"] = [self._number_of(each.file) for each in documents]
        rows["number"] = [each.number for each in documents]
        self._tokens.write(self._joined(encoded).tobytes())
        self._documents.write(rows.tobytes())
        for lost in self._tokenizer.find_lost([each.text for each in documents], encoded):
            counts["lost_characters"] += len(lost)
            if len(self.examples) < NUM_EXAMPLES:
                self.examples |= dict.fromkeys(lost)
        counts["documents"] += len(documents)
        counts["bytes"] += int(rows["num_bytes"].sum())
        counts["characters"] += sum(len(each.text) for each in documents)
        counts["tokens"] += int(rows["num_tokens"].sum())

    def _joined(self, encoded: list[list[int]]) -> np.ndarray:
        """Return the documents' ids, each followed by the end-of-document token."""
        end = self._tokenizer.end_of_document
        joined: list[int] = []
        for ids in encoded:
            joined += ids
            joined.append(end)
        return np.array(joined, self._dtype)

    def _number_of(self, file: str) -> int:
        if file != self._last_file or self._num_files == 0:
            self._files.write(json.dumps(file) + "\n")
            self._num_files, self._last_file = self._num_files + 1, file
        return self._num_files - 1

    def _encode(self, numbered: dict[int, Document]) -> tuple[list[Document], list[list[int]]]:
        """Return the documents that can be encoded, and the ids of each; the others become bad records."""
        documents, encoded = [], []
        every = encode_each(self._tokenizer, [document.text for document in numbered.values()])
        for (number, document), ids in zip(numbered.items(), every, strict=True):
            if not isinstance(ids, UnencodableTextError):
                documents.append(document)
                encoded.append(ids)
            elif self._unencodable is None:
                raise UnencodableDocumentError(number, str(ids))
            else:
                self._unencodable.write(json.dumps({"number": number, "reason": str(ids)}) + "\n")
        return documents, encoded
