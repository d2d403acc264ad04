"""Sources to token streams: every document tokenised once, in order, into the corpus folder's staging files."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_scoring.base.files import read_json, write_json, writing
from data_scoring.base.progress import Progress
from data_scoring.base.read_ahead import read_ahead
from data_scoring.config import SourceConfig
from data_scoring.corpus.indexed import token_dtype
from data_scoring.corpus.sources import read_documents
from data_scoring.tokenizer.tokenizer import Tokenizer

# One row a document. 64 bits of BLAKE2b tell documents apart: among a billion of them, the chance that any two
# different ones collide is below 3 %.
DOCUMENT = np.dtype([("digest", "<u8"), ("num_tokens", "<i4")])

_CHUNK_DOCUMENTS = 1 << 14
_BATCH_DOCUMENTS = 1024
_BATCH_CHARACTERS = 4 << 20
# Longer documents are tokenised in pieces cut at line ends: it bounds memory and keeps all cores busy.
_PIECE_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class StagedSource:
    """A tokenised source: its documents' tokens, one after the other, and a row for each document."""

    name: str
    tokens_path: Path
    documents_path: Path
    counts: dict[str, int]

    def documents(self) -> Iterator[np.ndarray]:
        """Yield the documents' rows, of `DOCUMENT`, a bounded number at a time."""
        with self.documents_path.open("rb") as file:
            while len(rows := np.fromfile(file, DOCUMENT, _CHUNK_DOCUMENTS)):
                yield rows


class Rejects:
    """Bad records of one source: raises at the first, or lists them in a file and goes on."""

    def __init__(self, path: Path, skip: bool) -> None:
        self.count = 0
        self._path, self._skip = path, skip
        path.unlink(missing_ok=True)

    def __call__(self, file: str, line: int, reason: str) -> None:
        """Take one bad record. Raises ValueError unless records are to be skipped."""
        if not self._skip:
            raise ValueError(f"{file}:{line}: {reason}, or set corpus.on_bad_record: skip")
        self.count += 1
        with self._path.open("a", encoding="utf-8") as rejects:
            rejects.write(json.dumps({"file": file, "line": line, "reason": reason}, ensure_ascii=False) + "\n")


def stage_source(
    source: SourceConfig, tokenizer: Tokenizer, staging: Path, skip_bad: bool, fingerprint: str, progress: Progress
) -> StagedSource:
    """Return the tokenised `source`, skipping the work where a completed record with `fingerprint` is there."""
    record_path = staging / f"{source.name}.json"
    tokens_path, documents_path = staging / f"{source.name}.tokens", staging / f"{source.name}.documents"
    record = read_json(record_path)
    if record is None or record["fingerprint"] != fingerprint:
        rejects = Rejects(staging / f"{source.name}.rejects.jsonl", skip_bad)
        with writing(tokens_path) as tokens_file, writing(documents_path) as documents_file:
            documents = read_ahead(batch_documents(read_documents(source, rejects)))
            counts = _tokenise(source.name, documents, tokenizer, tokens_file, documents_file, progress)
        record = {"fingerprint": fingerprint, **counts, "rejected": rejects.count}
        write_json(record_path, record)
    counts = {key: value for key, value in record.items() if key != "fingerprint"}
    return StagedSource(source.name, tokens_path, documents_path, counts)


def _tokenise(
    name: str,
    batches: Iterable[list[str]],
    tokenizer: Tokenizer,
    tokens_path: Path,
    documents_path: Path,
    progress: Progress,
) -> dict[str, int]:
    dtype = token_dtype(tokenizer.vocab_size)
    counts = {"documents": 0, "empty": 0, "bytes": 0, "tokens": 0}
    with tokens_path.open("wb") as tokens_file, documents_path.open("wb") as documents_file:
        for batch in batches:
            texts = [text for text in batch if text.strip()]
            encoded = _encode(texts, tokenizer)
            rows = np.empty(len(texts), DOCUMENT)
            for row, (text, ids) in enumerate(zip(texts, encoded, strict=True)):
                raw = text.encode()
                digest = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")
                rows[row] = (digest, len(ids))
                counts["bytes"] += len(raw)
                tokens_file.write(np.asarray(ids, dtype).tobytes())
            documents_file.write(rows.tobytes())
            counts["documents"] += len(texts)
            counts["empty"] += len(batch) - len(texts)
            counts["tokens"] += int(rows["num_tokens"].sum())
            progress(f"tokenising {name} (documents)", counts["documents"], None)
    return counts


def _encode(texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Return each text's ids with the end-of-document id appended."""
    pieces: list[str] = []
    owners: list[int] = []
    for owner, text in enumerate(texts):
        for piece in split_document(text):
            pieces.append(piece)
            owners.append(owner)
    encoded: list[list[int]] = [[] for _ in texts]
    for owner, ids in zip(owners, tokenizer.encode_batch(pieces), strict=True):
        encoded[owner].extend(ids)
    for ids in encoded:
        ids.append(tokenizer.end_of_document)
    return encoded


def split_document(text: str) -> Iterator[str]:
    """Yield a document in the pieces in which it is tokenised, cut at line ends."""
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        cut = text.rfind("\n", start, start + _PIECE_CHARACTERS) + 1 or start + _PIECE_CHARACTERS
        yield text[start:cut]
        start = cut
    yield text[start:]


def batch_documents(documents: Iterable[str]) -> Iterator[list[str]]:
    """Yield documents in lists that are worth tokenising at once and bounded in memory."""
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
