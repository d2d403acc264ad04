"""Preparing a corpus: from sources to shards, a validation set, a tokenizer and a manifest."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from typing_extensions import TypedDict

from data_scoring.base.files import checksum, fingerprint, remove_leftovers, write_record, writing
from data_scoring.base.progress import Progress
from data_scoring.base.validation import read_record
from data_scoring.config import CorpusConfig, TokenizerConfig
from data_scoring.corpus.corpus import FORMAT_VERSION
from data_scoring.corpus.documents import NAME as DOCUMENTS
from data_scoring.corpus.documents import Document, write_documents
from data_scoring.corpus.in_place import assign_in_place, index_in_place, locate_in_place, open_in_place
from data_scoring.corpus.indexed import token_dtype
from data_scoring.corpus.packing import (
    ShardAssignment,
    Stream,
    assign_roles,
    index_shards,
    locate_training,
    pack_shards,
    pack_validation,
)
from data_scoring.corpus.source_text import SourceText
from data_scoring.corpus.sources import check_source, open_megatron, resolve_format
from data_scoring.corpus.tokenise import STAGING_FORMAT, StagedSource, stage_source
from data_scoring.tokenizer.tokenizer import Tokenizer, install_tokenizer, open_tokenizer

_SAMPLES = pa.schema(
    [
        pa.field("shard", pa.int32()),
        pa.field("sample", pa.int32()),
        pa.field("source", pa.dictionary(pa.int32(), pa.string())),
        pa.field("num_tokens", pa.int32()),
    ]
)


def prepare_corpus(
    corpus: CorpusConfig,
    tokenizer: TokenizerConfig,
    seed: int,
    folder: Path,
    stage_fingerprint: str,
    progress: Progress,
) -> None:
    """Write the corpus to `folder`; `manifest.json` is written last and marks it as complete.

    Sources are read once: the text that a tokenizer was trained on is kept, compressed, until it is tokenised. Raises
    ValueError, naming file and line or field, for unusable input; the next attempt reuses the staged files of sources
    that were read completely.
    """
    in_place = check_corpus(corpus, tokenizer)
    staging = folder / "staging"
    staging.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    remove_leftovers(staging)
    texts = [SourceText(source, staging, corpus.on_bad_record == "skip") for source in corpus.sources]
    tokenizer_path = _make_tokenizer(tokenizer, texts, seed, folder, progress)
    opened = open_tokenizer(tokenizer_path, tokenizer.end_of_document)
    if in_place:
        entries = _prepare_in_place(corpus, opened, seed, folder, progress)
    else:
        entries = _prepare_from_text(corpus, texts, opened, tokenizer_path, seed, folder, progress)
    shutil.rmtree(staging)
    manifest = {
        "format_version": FORMAT_VERSION,
        "stage_fingerprint": stage_fingerprint,
        "seq_length": corpus.seq_length,
        "vocab_size": opened.vocab_size,
        "end_of_document": opened.end_of_document,
        "tokenizer": tokenizer_path.name,
        "files": {
            path.name: {"bytes": path.stat().st_size, "checksum": checksum(path)}
            for path in (tokenizer_path, folder / "samples.parquet", folder / DOCUMENTS, folder / "rejects.jsonl")
            if path.exists()
        },
        **entries,
    }
    write_record(folder / "manifest.json", manifest)


def check_corpus(corpus: CorpusConfig, tokenizer: TokenizerConfig) -> bool:
    """Return whether the corpus is used in place. Raises ValueError for invalid input, before anything is written."""
    names = [source.name for source in corpus.sources]
    if len(set(names)) < len(names):
        raise ValueError(f"corpus.sources: the names {names} are not distinct; rename the sources that share one")
    for source in corpus.sources:
        check_source(source)
    if tokenizer.path is not None:
        open_tokenizer(Path(tokenizer.path), tokenizer.end_of_document)
    in_place = [resolve_format(source) == "megatron" for source in corpus.sources]
    if any(in_place) and not all(in_place):
        raise ValueError(
            "corpus.sources: sources in Megatron's format are used in place and cannot be mixed with text; "
            "tokenise the text with Megatron's preprocess_data.py, or give the text of all sources"
        )
    if all(in_place) and tokenizer.path is None:
        raise ValueError("tokenizer.path: not set, but sources in Megatron's format need the one that tokenised them")
    return all(in_place)


class _TokenizerRecord(TypedDict):
    fingerprint: str
    checksum: str


def _make_tokenizer(
    config: TokenizerConfig, texts: Sequence[SourceText], seed: int, folder: Path, progress: Progress
) -> Path:
    """Return the path of the corpus' tokenizer; a tokenizer that an earlier attempt trained is reused."""
    if config.path is not None:
        return install_tokenizer(config, (), seed, folder)
    # Names of sources do not start with an underscore.
    record_path, path = folder / "staging" / "_tokenizer.json", folder / "tokenizer.json"
    identity = fingerprint(config.model_dump(), seed, [text.identity for text in texts])
    record = read_record(record_path, _TokenizerRecord)
    if record is None or record["fingerprint"] != identity or not path.exists() or record["checksum"] != checksum(path):
        path = install_tokenizer(config, (each.text for each in _all_documents(texts, progress)), seed, folder)
        write_record(record_path, {"fingerprint": identity, "checksum": checksum(path)})
    return path


def _all_documents(texts: Sequence[SourceText], progress: Progress) -> Iterator[Document]:
    """Yield every document, for training a tokenizer."""
    for text in texts:
        for number, document in enumerate(text.documents(keep=True), start=1):
            if number % 1000 == 0:
                progress(f"sampling {text.source.name} for the tokenizer (documents)", number, None)
            yield document


def _prepare_from_text(
    corpus: CorpusConfig,
    texts: Sequence[SourceText],
    tokenizer: Tokenizer,
    tokenizer_path: Path,
    seed: int,
    folder: Path,
    progress: Progress,
) -> dict[str, Any]:
    dtype = token_dtype(tokenizer.vocab_size)
    staging = folder / "staging"
    tokenizer_checksum = checksum(tokenizer_path)
    staged = [
        stage_source(
            text,
            tokenizer,
            fingerprint(text.source.model_dump(), text.skip_bad, tokenizer_checksum, STAGING_FORMAT),
            progress,
        )
        for text in texts
    ]
    for source, text in zip(staged, texts, strict=True):
        if source.counts["documents"] == 0:
            first = text.first_rejected()
            skipped = "" if first is None else f" ({source.counts['rejected']} bad records were skipped, first {first})"
            raise ValueError(
                f"corpus.sources.{source.name}.path: has no text{skipped}; remove the source or correct its path"
            )
    _collect_rejects(staged, staging, folder / "rejects.jsonl")
    results = assign_roles(staged, corpus.validation_fraction, seed)
    sample_length = corpus.seq_length + 1
    train = [Stream(result.source.name, result.tokens[0], sample_length) for result in results]
    held_out = [Stream(result.source.name, result.tokens[1], sample_length) for result in results]
    assignment = pack_shards(results, train, dtype, corpus.num_shards, seed, folder, progress)
    _write_samples(assignment, folder / "samples.parquet")
    write_documents(folder / DOCUMENTS, ((result.source.name, locate_training(result)) for result in results))
    sources = [
        {
            **{key: result.source.counts[key] for key in ("documents", "empty", "rejected", "bytes")},
            "name": result.source.name,
            "duplicates": result.documents[2],
            "validation_documents": result.documents[1],
            "train_tokens": result.tokens[0],
            "validation_tokens": result.tokens[1],
            **_lost(result.source.counts),
        }
        for result in results
    ]
    return {
        "sources": sources,
        "validation_bytes": {result.source.name: result.bytes[1] for result in results},
        "validation": pack_validation(results, held_out, dtype, folder),
        "shards": index_shards(assignment, dtype, folder),
    }


def _lost(counts: dict[str, Any]) -> dict[str, Any]:
    """Return what the manifest says of lost characters: nothing if there are none, as in earlier versions."""
    keys = ("characters", "lost_characters", "lost_examples") if counts["lost_characters"] else ()
    return {key: counts[key] for key in keys}


def _collect_rejects(staged: list[StagedSource], staging: Path, target: Path) -> None:
    if any(source.counts["rejected"] for source in staged):
        with writing(target) as temporary, temporary.open("wb") as out:
            for source in staged:
                rejects = staging / f"{source.name}.rejects.jsonl"
                if rejects.exists():
                    with rejects.open("rb") as lines:
                        shutil.copyfileobj(lines, out)


def _prepare_in_place(
    corpus: CorpusConfig, tokenizer: Tokenizer, seed: int, folder: Path, progress: Progress
) -> dict[str, Any]:
    opened = {source.name: open_megatron(source) for source in corpus.sources}
    sources = [open_in_place(name, indexed, tokenizer.vocab_size, folder, progress) for name, indexed in opened.items()]
    assignment = assign_in_place(sources, corpus.seq_length + 1, corpus.validation_fraction, corpus.num_shards, seed)
    validation, shards = index_in_place(assignment, sources, folder)
    _write_samples(assignment, folder / "samples.parquet", grouped=True)
    write_documents(folder / DOCUMENTS, ((name, locate_in_place(indexed)) for name, indexed in opened.items()))
    return {
        "sources": [source.entry() for source in sources],
        "validation": validation,
        "shards": shards,
    }


def _write_samples(assignment: ShardAssignment, path: Path, grouped: bool = False) -> None:
    """Write the table of samples; `grouped` numbers a shard's samples source by source, in the order of its parts."""
    names = pa.array([stream.name for stream in assignment.streams])
    numbers = range(len(assignment.streams))
    with writing(path) as temporary, pq.ParquetWriter(temporary, _SAMPLES) as writer:
        for shard in range(assignment.num_shards):
            sample = 0
            for wanted in numbers if grouped else [None]:
                for source, _, lengths in assignment.samples(shard):
                    chosen = np.arange(len(source)) if wanted is None else np.flatnonzero(source == wanted)
                    columns = [
                        pa.array(np.full(len(chosen), shard, np.int32)),
                        pa.array(np.arange(sample, sample + len(chosen), dtype=np.int32)),
                        pa.DictionaryArray.from_arrays(source[chosen].astype(np.int32), names),
                        pa.array((lengths[chosen] - 1).astype(np.int32)),
                    ]
                    writer.write_batch(pa.record_batch(columns, schema=_SAMPLES))
                    sample += len(chosen)
