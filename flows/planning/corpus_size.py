"""The size of a run's corpus: that of its manifest, or an estimate from a sample of its text."""

import json
import zlib
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from data_scoring.base.progress import silent
from data_scoring.base.temporary_folders import temporary_folder
from data_scoring.config import CorpusConfig, SourceConfig
from data_scoring.corpus.corpus import Corpus
from data_scoring.corpus.indexed import token_dtype
from data_scoring.corpus.packing import Stream
from data_scoring.corpus.prepare_corpus import prepare_corpus
from data_scoring.corpus.source_files import match_path, open_contents, open_file
from data_scoring.corpus.sources import open_megatron, read_documents, resolve_format
from flows.run.config import RunConfig
from flows.run.folder import Run

# Bytes of text that are tokenised for an estimate, of all sources together; and the least of each.
_SAMPLED_BYTES, _LEAST_BYTES = 4 << 20, 64 << 10
_PROBED_BYTES = 1 << 20


@dataclass(frozen=True)
class CorpusSize:
    """The size of a corpus, or of what is expected of it.

    num_samples: of all shards; train_tokens: their predicted tokens. num_bytes: of tokens on disk. text_bytes: of the
    documents. basis: where the numbers come from, in words.
    """

    num_samples: int
    train_tokens: int
    num_validation_samples: int
    validation_tokens: int
    num_bytes: int
    text_bytes: int
    basis: str


def prepared_size(run: Run) -> CorpusSize | None:
    """Return the size of the run's prepared corpus, or None if it is not prepared."""
    if not (run.corpus_folder / "manifest.json").exists():
        return None
    corpus = run.corpus()
    lengths = [corpus.lengths(shard) for shard in range(corpus.num_shards)]
    train = sum(int(each.sum(dtype=np.int64)) for each in lengths)
    num_samples = sum(map(len, lengths))
    validation = int(corpus.lengths(-1).sum(dtype=np.int64))
    # A sample has a token more than it predicts.
    num_tokens = train + num_samples + validation + corpus.num_validation_samples
    return CorpusSize(
        num_samples,
        train,
        corpus.num_validation_samples,
        validation,
        num_tokens * np.dtype(token_dtype(corpus.vocab_size)).itemsize,
        0,
        "the prepared corpus",
    )


def sampled_corpus(config: RunConfig, folder: Path) -> tuple[Corpus, CorpusSize]:
    """Return a corpus of a sample of the text, prepared in `folder`, and the size that follows for the whole.

    Raises ValueError if the text cannot be read.
    """
    budget = max(_LEAST_BYTES, _SAMPLED_BYTES // len(config.corpus.sources))
    sources, totals, is_whole = [], {}, True
    for source in config.corpus.sources:
        path = folder / f"{source.name}.jsonl"
        sampled, is_all = _write_sample(source, path, budget)
        totals[source.name] = sampled if is_all else _text_bytes(source)
        is_whole = is_whole and is_all
        sources.append(SourceConfig(name=source.name, path=str(path), format="jsonl"))
    fields = {**dict(config.corpus), "sources": tuple(sources), "num_shards": 1, "on_bad_record": "skip"}
    corpus_folder = folder / "corpus"
    prepare_corpus(CorpusConfig.model_validate(fields), config.tokenizer, config.seed, corpus_folder, "sample", silent)
    corpus = Corpus(corpus_folder)
    return corpus, _scaled(corpus, totals, is_whole)


def sampled_size(config: RunConfig) -> CorpusSize:
    """Return the size of the corpus by a sample of its text. Raises ValueError if the text cannot be read."""
    with temporary_folder() as folder:
        return sampled_corpus(config, folder)[1]


def megatron_size(config: RunConfig) -> CorpusSize | None:
    """Return the size of a corpus in Megatron's format, which is used in place, or None if the sources are text."""
    if any(resolve_format(source) != "megatron" for source in config.corpus.sources):
        return None
    fraction, length = config.corpus.validation_fraction, config.corpus.seq_length + 1
    counts = [open_megatron(source).num_tokens for source in config.corpus.sources]
    train = sum(Stream("", round(count * (1 - fraction)), length).num_samples for count in counts)
    held_out = sum(Stream("", round(count * fraction), length).num_samples for count in counts)
    tokens = (length - 1) * train, (length - 1) * held_out
    return CorpusSize(train, tokens[0], held_out, tokens[1], 0, 0, "the sources' indices")


def _write_sample(source: SourceConfig, path: Path, budget: int) -> tuple[int, bool]:
    """Write the first documents of a source to `path`; return their bytes of text, and whether they are all."""
    num_bytes = 0
    with path.open("w", encoding="utf-8") as file, closing(_documents(source)) as documents:
        for document in documents:
            file.write(json.dumps({"text": document}) + "\n")
            num_bytes += len(document.encode("utf-8", "replace"))
            # Python's own text has no files to measure.
            if num_bytes >= budget and source.format != "python":
                return num_bytes, next(documents, None) is None
    return num_bytes, True


def _documents(source: SourceConfig) -> Generator[str, None, None]:
    def ignore(file: str, line: int, reason: str) -> None:
        """Prepare reports bad records."""

    yield from read_documents(source, ignore)


def _text_bytes(source: SourceConfig) -> int:
    """Return an estimate of a source's bytes of text, from the sizes of its files and a part of its first one."""
    names = match_path(source.path)
    stored = sum(Path(name).stat().st_size for name in names if Path(name).exists())
    if not stored:
        raise ValueError(
            f"corpus.sources.{source.name}: its size cannot be told before it is read; prepare the corpus first "
            "(`reprise prepare CONFIG`)"
        )
    documents = list(islice(_documents(source), 1000))
    mean = sum(len(each.encode("utf-8", "replace")) for each in documents) / len(documents)
    most = None if source.max_documents is None else round(mean * source.max_documents)
    total = round(stored * _text_share(source, names[0], documents))
    return total if most is None else min(total, most)


def _text_share(source: SourceConfig, name: str, documents: list[str]) -> float:
    """Return the bytes of text for each byte that is stored in the file `name`."""
    kind = resolve_format(source)
    if kind == "parquet":
        import pyarrow.parquet as pq

        with pq.ParquetFile(name) as opened:
            mean = sum(len(each.encode("utf-8", "replace")) for each in documents) / len(documents)
            return float(opened.metadata.num_rows * mean / Path(name).stat().st_size)
    contents = open_contents(name)
    with open_file(name) as stored:
        # The generator closes the file when it ends.
        content = next(contents)[1].read(_PROBED_BYTES)
        is_compressed = stored.read(64) != content[:64]
    expansion = 1.0
    if is_compressed:
        # How far the file's own compression goes is not known from a part of it; zlib's stands for it.
        is_whole = len(content) < _PROBED_BYTES
        expansion = len(content) / (Path(name).stat().st_size if is_whole else len(zlib.compress(content)))
    if kind != "jsonl":
        return expansion
    lines = content.splitlines(keepends=True)[: len(documents)]
    text = sum(len(each.encode("utf-8", "replace")) for each in documents[: len(lines)])
    return expansion * min(1.0, text / max(1, sum(map(len, lines))))


def _scaled(corpus: Corpus, totals: dict[str, int], is_whole: bool) -> CorpusSize:
    """Return the size of the whole text, of which each source has `totals` bytes, by the sample in `corpus`."""
    length = corpus.seq_length + 1
    train, held_out = [], []
    for source in corpus.manifest["sources"]:
        ratio = totals[source["name"]] / max(1, source["bytes"])
        train.append(Stream("", round(ratio * source["train_tokens"]), length))
        held_out.append(Stream("", round(ratio * source["validation_tokens"]), length))
    num_samples, num_held_out = (sum(each.num_samples for each in part) for part in (train, held_out))
    num_tokens, num_held_out_tokens = (sum(each.num_tokens for each in part) for part in (train, held_out))
    text_bytes = sum(totals.values())
    basis = "the whole text" if is_whole else "an estimate from a sample of the text"
    return CorpusSize(
        num_samples,
        num_tokens - num_samples,
        num_held_out,
        num_held_out_tokens - num_held_out,
        (num_tokens + num_held_out_tokens) * np.dtype(token_dtype(corpus.vocab_size)).itemsize,
        text_bytes,
        basis,
    )
