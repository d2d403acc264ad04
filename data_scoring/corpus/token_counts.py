"""Token counts of a corpus: streamed, per source, and resumed after a kill."""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.dataset
from numpy.typing import NDArray

from data_scoring.base.engine import Count, Engine, num_threads
from data_scoring.base.files import fingerprint, remove_leftovers, writing
from data_scoring.base.progress import Progress
from data_scoring.base.sql import literal, parquet_rows
from data_scoring.corpus.corpus import Corpus
from data_scoring.corpus.sources import batch_documents
from data_scoring.tokenizer.tokenizer import Tokenizer, encode_each, sample_texts

_SAMPLES_AT_ONCE = 1024
# Stretches of a corpus are of at least this many tokens; there are about this many of them at most.
_LEAST_TOKENS = 1 << 24
_MOST_STRETCHES = 1 << 10
# From here on, counting takes more than a minute.
_LONG_TOKENS = 1 << 30
# Version of the saved counts; counts of another version are computed again.
_FORMAT = 2


@dataclass(frozen=True)
class SourceCounts:
    """How often each token occurs in one source, [vocab_size] int64; end-of-document tokens are not counted."""

    name: str
    counts: NDArray[np.int64]


@dataclass(frozen=True)
class SourceLength:
    """The number of tokens of one source's text under two tokenizers; is_sample: only a sample was measured."""

    name: str
    num_bytes: int
    tokens_before: int
    tokens_after: int
    is_sample: bool


def _read_counts(path: Path, identity: str, shape: tuple[int, ...]) -> tuple[NDArray[np.int64], int, bool]:
    try:
        with np.load(path) as part:
            if str(part["identity"]) == identity:
                return part["counts"], int(part["documents"]), bool(part["is_complete"])
    except (FileNotFoundError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        pass  # Missing or unreadable: count from the start.
    return np.zeros(shape, np.int64), 0, False


def _write_counts(path: Path, identity: str, counts: NDArray[np.int64], documents: int, is_complete: bool) -> None:
    with writing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, identity=identity, counts=counts, documents=documents, is_complete=is_complete)


@dataclass(frozen=True)
class _Stretch:
    """The samples `start` to `stop` - 1 of a shard; number: among all stretches of the corpus."""

    number: int
    shard: int
    start: int
    stop: int


def count_corpus(
    corpus: Corpus, end_of_document: int, folder: Path, engine: Engine, progress: Progress
) -> list[SourceCounts]:
    """Return the token counts of each source of a prepared corpus, without the validation set.

    The corpus is divided into stretches, with a task for each, which writes its counts to `folder`. What an interrupted
    call left there is used.
    """
    names = sorted(source["name"] for source in corpus.manifest["sources"])
    identity, shape = fingerprint(corpus.fingerprint, _FORMAT), (len(names), corpus.vocab_size)
    path = folder / f"corpus-{identity}.npz"
    counts, _, is_complete = _read_counts(path, identity, shape)
    if not is_complete:
        stretches = _divide(corpus)
        num_samples = sum(stretch.stop - stretch.start for stretch in stretches)

        def report(done: int) -> None:
            progress("counting the corpus (shards)", done * corpus.num_shards // num_samples, corpus.num_shards)

        work = partial(_count_stretch, corpus.folder, names, identity, folder)
        counts = np.zeros(shape, np.int64)
        for part in engine.map(work, stretches, report, is_long=num_samples * corpus.seq_length >= _LONG_TOKENS):
            counts += _read_counts(part, identity, shape)[0]
        _write_counts(path, identity, counts, num_samples, is_complete=True)
        for stretch in stretches:
            _stretch_path(folder, identity, stretch).unlink(missing_ok=True)
        # Left by workers that were lost.
        remove_leftovers(folder, path.stem)
    counts[:, end_of_document] = 0
    return [SourceCounts(name, row) for name, row in zip(names, counts, strict=True)]


def _divide(corpus: Corpus) -> list[_Stretch]:
    sizes = [corpus.num_samples(shard) for shard in range(corpus.num_shards)]
    step = max(1, _LEAST_TOKENS // corpus.seq_length, sum(sizes) // _MOST_STRETCHES)
    places = ((shard, start) for shard, size in enumerate(sizes) for start in range(0, size, step))
    return [
        _Stretch(number, shard, start, min(start + step, sizes[shard])) for number, (shard, start) in enumerate(places)
    ]


def _stretch_path(folder: Path, identity: str, stretch: _Stretch) -> Path:
    return folder / f"corpus-{identity}-{stretch.number:05d}.npz"


def _count_stretch(
    corpus_folder: Path, names: list[str], identity: str, folder: Path, stretch: _Stretch, count: Count
) -> Path:
    """Write the counts of a stretch, [num_sources, vocab_size] int64, unless they exist; return the file's path."""
    corpus, path = Corpus(corpus_folder), _stretch_path(folder, identity, stretch)
    counts, _, is_complete = _read_counts(path, identity, (len(names), corpus.vocab_size))
    if not is_complete:
        sources = _sources_of(corpus, stretch)
        for start in range(stretch.start, stretch.stop, _SAMPLES_AT_ONCE):
            samples = np.arange(start, min(start + _SAMPLES_AT_ONCE, stretch.stop))
            read = corpus.read(np.full(len(samples), stretch.shard), samples)
            is_real = np.arange(corpus.seq_length + 1) <= read.num_tokens[:, None]
            mine = sources[samples - stretch.start]
            for row, name in enumerate(names):
                tokens = read.tokens[is_real & (mine == name)[:, None]]
                counts[row] += np.bincount(tokens, minlength=corpus.vocab_size)
            count(int(samples[-1]) + 1 - stretch.start)
        _write_counts(path, identity, counts, stretch.stop - stretch.start, is_complete=True)
    count(stretch.stop - stretch.start)
    return path


def _sources_of(corpus: Corpus, stretch: _Stretch) -> NDArray[np.str_]:
    """Return the source of each sample of a stretch, [n]."""
    query = f"""select source from {parquet_rows(corpus.samples_path)}
        where shard = {stretch.shard} and sample >= {stretch.start} and sample < {stretch.stop} order by sample"""
    with duckdb.connect() as connection:
        if (threads := num_threads()) is not None:
            connection.execute(f"set threads = {threads}")
        return np.asarray(connection.sql(query).fetchnumpy()["source"], np.str_)


def texts_of(corpus: Corpus, source: str, tokenizer: Tokenizer, num_bytes: int, seed: int) -> Iterator[str]:
    """Yield random samples of a source of a prepared corpus, decoded, until they exceed `num_bytes`."""
    # A token is rarely shorter than a byte; the factor of 4 leaves a margin.
    query = f"""select shard, sample from samples where source = {literal(source)}
        order by hash(shard, sample, {seed}) limit {1 + 4 * num_bytes // corpus.seq_length}"""
    with duckdb.connect() as connection:
        # DuckDB itself would take brackets in the path for a pattern, and folders called key=value for columns.
        connection.register("samples", pyarrow.dataset.dataset(corpus.samples_path))
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
    """Return the lengths of a random sample of about `num_bytes` of text under two `tokenizers`, the old and the new.

    Raises ValueError if the new one does not decode a text to the same string as the old one.
    """
    seen = measured = 0
    lengths = [0, 0]

    def counted() -> Iterator[str]:
        nonlocal seen
        for text in texts:
            seen += len(text.encode())
            yield text

    for texts_at_once in batch_documents(sample_texts(counted(), num_bytes, seed)):
        encoded = encode_each(tokenizers[0], texts_at_once)
        batch = [text for text, ids in zip(texts_at_once, encoded, strict=True) if isinstance(ids, list)]
        before = [ids for ids in encoded if isinstance(ids, list)]
        measured += sum(len(text.encode()) for text in batch)
        for place, (old, new) in enumerate(zip(before, tokenizers[1].encode_batch(batch), strict=True)):
            lengths[0] += len(old)
            lengths[1] += len(new)
            if tokenizers[0].decode(old) != tokenizers[1].decode(new):
                raise ValueError(
                    f"{name}: the smaller tokenizer does not decode this text as the original one does: "
                    f"{batch[place][:80]!r}; please report this with the tokenizer, and use another size"
                )
    return SourceLength(name, measured, lengths[0], lengths[1], is_sample=measured < seen)
