"""Preparing a corpus: from sources to shards, a validation set, a tokenizer and a manifest.

An engine works on the parts of the sources, and then on the shards; what they wrote is joined here, in their order. So
the corpus is the same whatever the engine.
"""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from data_scoring.base.engine import Engine, LocalEngine
from data_scoring.base.files import checksum, remove_leftovers, write_record, writing
from data_scoring.base.progress import Progress
from data_scoring.config import CorpusConfig, TokenizerConfig
from data_scoring.corpus.corpus import FORMAT_VERSION
from data_scoring.corpus.documents import NAME as DOCUMENTS
from data_scoring.corpus.documents import write_documents
from data_scoring.corpus.in_place import assign_in_place, index_shard, locate_in_place, open_in_place
from data_scoring.corpus.packing import ShardAssignment, write_samples
from data_scoring.corpus.preparation import Preparation
from data_scoring.corpus.prepare_text import prepare_text
from data_scoring.corpus.source_parts import LONG_BYTES
from data_scoring.corpus.sources import FoundSource, cut_sources, find_source, is_in_place, open_megatron
from data_scoring.corpus.tokenise import TokenizerFile
from data_scoring.corpus.tokenizer_text import make_tokenizer
from data_scoring.tokenizer.tokenizer import Tokenizer, open_tokenizer

_HERE = LocalEngine(1)


def prepare_corpus(
    corpus: CorpusConfig,
    tokenizer: TokenizerConfig,
    seed: int,
    folder: Path,
    stage_fingerprint: str,
    progress: Progress,
    engine: Engine = _HERE,
) -> None:
    """Write the corpus to `folder`; `manifest.json` is written last and marks it as complete.

    Sources are read once: the text that a tokenizer was trained on is kept, compressed, until it is tokenised. Raises
    ValueError, naming file and line or field, for unusable input; the next attempt reuses the staged files of parts
    that were read completely.
    """
    found = check_corpus(corpus, tokenizer)
    in_place = is_in_place(found)
    staging = folder / "staging"
    staging.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    remove_leftovers(staging)
    sources = [] if in_place else cut_sources(found)
    num_bytes = sum(part.num_bytes for source in sources for part in source)
    if in_place:
        num_bytes = sum(open_megatron(source).data.size for source in corpus.sources)
    is_long = num_bytes > LONG_BYTES
    preparation = Preparation(folder, seed, corpus.on_bad_record == "skip", is_long, progress, engine)
    tokenizer_path = make_tokenizer(tokenizer, sources, preparation)
    file = TokenizerFile(tokenizer_path, tokenizer.end_of_document, checksum(tokenizer_path))
    opened = file.open()
    if in_place:
        entries = _prepare_in_place(corpus, opened, preparation)
    else:
        entries = prepare_text(corpus, sources, file, preparation)
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
    shutil.rmtree(staging)
    # Workers that were lost leave files, too.
    remove_leftovers(folder)
    write_record(folder / "manifest.json", manifest)


def check_corpus(corpus: CorpusConfig, tokenizer: TokenizerConfig) -> list[FoundSource]:
    """Return the sources and their files. Raises ValueError for invalid input, before anything is written."""
    names = [source.name for source in corpus.sources]
    if len(set(names)) < len(names):
        raise ValueError(f"corpus.sources: the names {names} are not distinct; rename the sources that share one")
    sources = [find_source(source) for source in corpus.sources]
    if tokenizer.path is not None:
        open_tokenizer(Path(tokenizer.path), tokenizer.end_of_document)
    if len({found.kind == "megatron" for found in sources}) > 1:
        raise ValueError(
            "corpus.sources: sources in Megatron's format are used in place and cannot be mixed with text; "
            "tokenise the text with Megatron's preprocess_data.py, or give the text of all sources"
        )
    if is_in_place(sources) and tokenizer.path is None:
        raise ValueError("tokenizer.path: not set, but sources in Megatron's format need the one that tokenised them")
    return sources


def _prepare_in_place(corpus: CorpusConfig, tokenizer: Tokenizer, preparation: Preparation) -> dict[str, Any]:
    folder, opened = preparation.folder, {source.name: open_megatron(source) for source in corpus.sources}
    num_tokens = sum(indexed.num_tokens for indexed in opened.values())
    check = partial(open_in_place, vocab_size=tokenizer.vocab_size, folder=folder)
    sources = [*preparation.map(check, corpus.sources, "checking text (tokens)", num_tokens)]
    length, seed = corpus.seq_length + 1, preparation.seed
    assignment = assign_in_place(sources, length, corpus.validation_fraction, corpus.num_shards, seed)
    index = partial(index_shard, assignment=assignment, in_place=sources, folder=folder)
    numbers = [None, *range(assignment.num_shards)]
    validation, *shards = preparation.map(index, numbers, "writing shards (samples)", assignment.permutation.size)
    _write_samples(assignment, folder / "samples.parquet")
    write_documents(folder / DOCUMENTS, ((name, locate_in_place(indexed)) for name, indexed in opened.items()))
    return {
        "sources": [source.entry() for source in sources],
        "validation": validation,
        "shards": shards,
    }


def _write_samples(assignment: ShardAssignment, path: Path) -> None:
    """Write the table of samples; a shard's samples are numbered source by source, in the order of its parts."""
    with writing(path) as temporary, write_samples(temporary, assignment.streams) as add:
        for shard in range(assignment.num_shards):
            sample = 0
            for wanted in range(len(assignment.streams)):
                for source, _, lengths in assignment.samples(shard):
                    is_wanted = source == wanted
                    add(shard, sample, source[is_wanted], lengths[is_wanted])
                    sample += int(is_wanted.sum())
