"""The other steps whose cost grows with the corpus, each on one core: what docs/scale.md is worked out from."""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_scoring.base.engine import LocalEngine, limit_threads
from data_scoring.base.files import checksum
from data_scoring.base.progress import silent
from data_scoring.config import CorpusConfig, TokenizerConfig
from data_scoring.corpus.corpus import Corpus
from data_scoring.corpus.digests import find_duplicates, write_digests
from data_scoring.corpus.documents import Rows, join_documents, write_documents
from data_scoring.corpus.packing import ShardAssignment, Stream, join_samples, write_samples
from data_scoring.corpus.prepare_corpus import prepare_corpus
from data_scoring.corpus.tokenise import DOCUMENT
from data_scoring.refine.near_duplicates import write_near_duplicates

NUM_ROWS = 4_000_000
SEQ_LENGTH = 4096
TURNS = 3


def data_stages(folder: Path) -> list[dict[str, Any]]:
    """Return the speed of each step on one core, in units of what it works on."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    limit_threads(1)
    corpus = _corpus(folder)
    num_tokens = sum(corpus.num_samples(shard) for shard in range(corpus.num_shards)) * SEQ_LENGTH
    digests = _digests(folder)
    documents, samples = _documents(folder), _samples(folder)
    blob = folder / "blob"
    blob.write_bytes(np.random.default_rng(0).bytes(1 << 28))
    steps: dict[str, tuple[Callable[[], object], float]] = {
        "near duplicates at 0.8, million tokens a second": (lambda: _near_duplicates(corpus, folder), num_tokens / 1e6),
        "looking for duplicates, million documents a second": (
            lambda: find_duplicates(range(256), lambda done: None, staging=folder, parts=[digests]),
            NUM_ROWS / 1e6,
        ),
        "joining documents.parquet, million rows a second": (
            lambda: join_documents([documents], folder / "joined.parquet"),
            NUM_ROWS / 1e6,
        ),
        "joining samples.parquet, million rows a second": (
            lambda: join_samples([samples], folder / "joined.parquet"),
            NUM_ROWS / 1e6,
        ),
        "checksums, MB a second": (lambda: checksum(blob), blob.stat().st_size / 1e6),
    }
    return [_speed(name, work, amount) for name, (work, amount) in steps.items()]


def _speed(name: str, work: Callable[[], object], amount: float) -> dict[str, Any]:
    speeds = []
    for _ in range(TURNS):
        started = time.perf_counter()
        work()
        speeds.append(amount / (time.perf_counter() - started))
    median, least, most = statistics.median(speeds), min(speeds), max(speeds)
    return {"claim": name, "median": round(median, 2), "min": round(least, 2), "max": round(most, 2)}


def _corpus(folder: Path) -> Corpus:
    """Return a corpus of the standard library's source."""
    sources = [{"name": "source", "format": "python", "path": "source"}]
    config = CorpusConfig.model_validate({"sources": sources, "seq_length": SEQ_LENGTH, "num_shards": 2})
    prepare_corpus(config, TokenizerConfig(vocab_size=8192, train_megabytes=4), 0, folder / "corpus", "bench", silent)
    return Corpus(folder / "corpus")


def _near_duplicates(corpus: Corpus, folder: Path) -> None:
    path = folder / "near-duplicates.parquet"
    path.unlink(missing_ok=True)
    write_near_duplicates(corpus, 0.8, path, 4.0, LocalEngine(1), silent)


def _digests(folder: Path) -> Path:
    rows = np.zeros(NUM_ROWS, DOCUMENT)
    rows["digest"] = np.random.default_rng(0).integers(0, 2**64, NUM_ROWS, np.uint64)
    write_digests(iter([rows]), folder / "part.digests", folder / "part.digest-bounds.npy")
    return folder / "part"


def _documents(folder: Path) -> Path:
    """Write the documents of files of 1000 each, in the row groups that preparing makes."""

    def rows() -> Iterator[Rows]:
        for start in range(0, NUM_ROWS, 1 << 14):
            numbers = np.arange(start, min(start + (1 << 14), NUM_ROWS))
            names = [f"/data/web/part-{number // 1000:05d}.jsonl.gz" for number in numbers.tolist()]
            yield Rows(names, numbers % 1000 + 1, numbers * 1000)

    write_documents(folder / "documents.parquet", [("web", rows())])
    return folder / "documents.parquet"


def _samples(folder: Path) -> Path:
    streams = [Stream("web", NUM_ROWS * 257, 257)]
    assignment = ShardAssignment(streams, 1, 0)
    with write_samples(folder / "samples.parquet", streams) as add:
        first = 0
        for source, _, lengths in assignment.samples(0):
            add(0, first, source, lengths)
            first += len(source)
    return folder / "samples.parquet"
