"""Tokenising sources: each document once, in order, into staging files in the corpus folder."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_scoring.base.files import read_json, write_record, writing
from data_scoring.base.progress import Progress
from data_scoring.base.read_ahead import read_ahead
from data_scoring.corpus.indexed import token_dtype
from data_scoring.corpus.source_text import SourceText
from data_scoring.corpus.sources import batch_documents
from data_scoring.tokenizer.tokenizer import Tokenizer

# One row per document. Documents are distinguished by 64 bits of BLAKE2b: among a billion documents, the probability
# of any collision is below 3 %.
DOCUMENT = np.dtype([("digest", "<u8"), ("num_tokens", "<i4")])

_CHUNK_DOCUMENTS = 1 << 14
# Longer documents are tokenised in pieces, split at line ends, which bounds memory and keeps all cores busy.
_PIECE_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class StagedSource:
    """A tokenised source: the concatenated tokens of its documents, and a row for each document."""

    name: str
    tokens_path: Path
    documents_path: Path
    counts: dict[str, int]

    def documents(self) -> Iterator[np.ndarray]:
        """Yield arrays of the documents' rows (dtype `DOCUMENT`), of bounded length."""
        with self.documents_path.open("rb") as file:
            while len(rows := np.fromfile(file, DOCUMENT, _CHUNK_DOCUMENTS)):
                yield rows


def stage_source(text: SourceText, tokenizer: Tokenizer, fingerprint: str, progress: Progress) -> StagedSource:
    """Return the tokenised source of `text`; finished work with the same `fingerprint` is reused."""
    name, staging = text.source.name, text.staging
    record_path = staging / f"{name}.json"
    tokens_path, documents_path = staging / f"{name}.tokens", staging / f"{name}.documents"
    record = read_json(record_path)
    if record is None or record["fingerprint"] != fingerprint:
        with writing(tokens_path) as tokens_file, writing(documents_path) as documents_file:
            documents = read_ahead(batch_documents(text.documents()))
            counts = _tokenise(name, documents, tokenizer, tokens_file, documents_file, progress)
        record = {"fingerprint": fingerprint, **counts, "rejected": text.num_rejected()}
        write_record(record_path, record)
    text.forget()
    counts = {key: value for key, value in record.items() if key != "fingerprint"}
    return StagedSource(name, tokens_path, documents_path, counts)


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
    """Yield the pieces of a document in which it is tokenised, split at line ends."""
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        cut = text.rfind("\n", start, start + _PIECE_CHARACTERS) + 1 or start + _PIECE_CHARACTERS
        yield text[start:cut]
        start = cut
    yield text[start:]
