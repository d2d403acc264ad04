"""How often a corpus uses each token: counted source by source, in a stream, and gone on with after a kill."""

import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_scoring.base.files import fingerprint, writing
from data_scoring.base.progress import Progress
from data_scoring.base.read_ahead import read_ahead
from data_scoring.base.sql import literal
from data_scoring.config import SourceConfig
from data_scoring.corpus.corpus import Corpus
from data_scoring.corpus.sources import Rejects, batch_documents, read_documents, stamp_files
from data_scoring.corpus.tokenise import split_document
from data_scoring.tokenizer.tokenizer import Tokenizer, sample_texts

# The most that a kill costs.
_SAVE_SECONDS = 20.0
_SAMPLES_AT_ONCE = 1024
# Of the counts that are kept; others are made again.
_FORMAT = 1


@dataclass(frozen=True)
class SourceCounts:
    """One source: how often each token occurs in it, [vocab_size] int64, ends of documents left out."""

    name: str
    counts: NDArray[np.int64]


@dataclass(frozen=True)
class SourceLength:
    """How many tokens two tokenizers make of the same text of one source; is_sample: it is not all of its text."""

    name: str
    num_bytes: int
    tokens_before: int
    tokens_after: int
    is_sample: bool


def encode(texts: list[str], tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Return the tokens of all `texts`, one after the other, [num_tokens] int64."""
    encoded = tokenizer.encode_batch([piece for text in texts for piece in split_document(text)])
    return np.concatenate([np.asarray(ids, np.int64) for ids in encoded]) if encoded else np.empty(0, np.int64)


def count_source(
    source: SourceConfig, tokenizer: Tokenizer, checksum: str, folder: Path, skip_bad: bool, progress: Progress
) -> SourceCounts:
    """Return the counts of `source`, from where an earlier call that was ended left off in `folder`.

    `checksum` identifies the tokenizer. Raises ValueError where the source cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # The text that Python carries is another with every version.
    identity = fingerprint(source.model_dump(), stamp_files(source), skip_bad, checksum, sys.version, _FORMAT)
    path = folder / f"{source.name}-{identity}.npz"
    counts, done, is_complete = _read_part(path, identity, (tokenizer.vocab_size,))
    if is_complete:
        return SourceCounts(source.name, counts)
    rejects = Rejects(folder / f"{source.name}.rejects.jsonl", skip_bad)
    saved = time.monotonic()
    for batch in read_ahead(batch_documents(islice(read_documents(source, rejects), done, None))):
        counts += np.bincount(encode(batch, tokenizer), minlength=tokenizer.vocab_size)
        done += len(batch)
        progress(f"counting {source.name} (documents)", done, None)
        if time.monotonic() - saved > _SAVE_SECONDS:
            _write_part(path, identity, counts, done, is_complete=False)
            saved = time.monotonic()
    if not counts.any():
        raise ValueError(f"corpus.sources.{source.name}.path: holds no text; remove the source or correct its path")
    _write_part(path, identity, counts, done, is_complete=True)
    return SourceCounts(source.name, counts)


def _read_part(path: Path, identity: str, shape: tuple[int, ...]) -> tuple[NDArray[np.int64], int, bool]:
    try:
        with np.load(path) as part:
            if str(part["identity"]) == identity:
                return part["counts"], int(part["documents"]), bool(part["is_complete"])
    except (FileNotFoundError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        pass  # Not there, or of no use: counted anew.
    return np.zeros(shape, np.int64), 0, False


def _write_part(path: Path, identity: str, counts: NDArray[np.int64], documents: int, is_complete: bool) -> None:
    with writing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, identity=identity, counts=counts, documents=documents, is_complete=is_complete)


def count_corpus(corpus: Corpus, end_of_document: int, folder: Path, progress: Progress) -> list[SourceCounts]:
    """Return the counts of a prepared corpus' sources, of its shards as they lie; the validation set is left out.

    Goes on where an earlier call that was ended left off in `folder`.
    """
    names = sorted(source["name"] for source in corpus.manifest["sources"])
    identity = fingerprint(corpus.fingerprint, _FORMAT)
    path = folder / f"corpus-{identity}.npz"
    counts, done, is_complete = _read_part(path, identity, (len(names), corpus.vocab_size))
    batches = pq.ParquetFile(corpus.samples_path).iter_batches(_SAMPLES_AT_ONCE, columns=["shard", "sample", "source"])
    saved = time.monotonic()
    for batch in () if is_complete else islice(batches, done, None):
        shards = batch["shard"].to_numpy()
        read = corpus.read(shards, batch["sample"].to_numpy())
        is_real = np.arange(corpus.seq_length + 1) <= read.num_tokens[:, None]
        sources = np.asarray(batch["source"].to_pylist())
        for row, name in enumerate(names):
            tokens = read.tokens[is_real & (sources == name)[:, None]]
            counts[row] += np.bincount(tokens, minlength=corpus.vocab_size)
        done += 1
        progress("counting the corpus (shards)", int(shards[-1]), corpus.num_shards)
        if time.monotonic() - saved > _SAVE_SECONDS:
            _write_part(path, identity, counts, done, is_complete=False)
            saved = time.monotonic()
    if not is_complete:
        _write_part(path, identity, counts, done, is_complete=True)
    counts[:, end_of_document] = 0
    return [SourceCounts(name, row) for name, row in zip(names, counts, strict=True)]


def texts_of(corpus: Corpus, source: str, tokenizer: Tokenizer, num_bytes: int, seed: int) -> Iterator[str]:
    """Yield samples of a prepared corpus' source, drawn at random, as text, until there are over `num_bytes` of it."""
    # A token is a byte at least, or next to it.
    query = f"""select shard, sample from {literal(str(corpus.samples_path))} where source = {literal(source)}
        order by hash(shard, sample, {seed}) limit {1 + 4 * num_bytes // corpus.seq_length}"""
    with duckdb.connect() as connection:
        rows = connection.execute(query).fetchnumpy()
    total = 0
    for shard, sample in zip(rows["shard"], rows["sample"], strict=True):
        read = corpus.read(np.array([shard]), np.array([sample]))
        tokens = read.tokens[0, : read.num_tokens[0] + 1]
        text = tokenizer.decode(tokens[tokens != tokenizer.end_of_document].tolist())
        total += len(text.encode())
        yield text
        if total > num_bytes:
            return


def measure_length(
    name: str, texts: Iterator[str], tokenizers: tuple[Tokenizer, Tokenizer], num_bytes: int, seed: int
) -> SourceLength:
    """Return what the two `tokenizers`, the old and the new one, make of a random sample of about `num_bytes` of text.

    Raises ValueError where the new one does not bring a text back as the old one does.
    """
    seen = measured = 0
    lengths = [0, 0]

    def counted() -> Iterator[str]:
        nonlocal seen
        for text in texts:
            seen += len(text.encode())
            yield text

    for batch in batch_documents(sample_texts(counted(), num_bytes, seed)):
        measured += sum(len(text.encode()) for text in batch)
        pieces = [piece for text in batch for piece in split_document(text)]
        before, after = (tokenizer.encode_batch(pieces) for tokenizer in tokenizers)
        for place, (old, new) in enumerate(zip(before, after, strict=True)):
            lengths[0] += len(old)
            lengths[1] += len(new)
            if tokenizers[0].decode(old) != tokenizers[1].decode(new):
                raise ValueError(
                    f"{name}: the smaller tokenizer does not bring this text back as the whole one does: "
                    f"{pieces[place][:80]!r}; please report it with the tokenizer, and take another size"
                )
    return SourceLength(name, measured, lengths[0], lengths[1], is_sample=measured < seen)
