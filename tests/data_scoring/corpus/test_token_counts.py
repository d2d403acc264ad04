"""Token counts: of sources, resumed after a kill, and of a corpus that is tokenised already."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

import data_scoring.corpus.token_counts
from data_scoring.base.engine import Engine, LocalEngine
from data_scoring.base.progress import silent
from data_scoring.config import SourceConfig
from data_scoring.corpus.corpus import Corpus
from data_scoring.corpus.token_counts import count_corpus, measure_length, texts_of
from data_scoring.tokenizer.tokenizer import Tokenizer, open_tokenizer
from tests.conftest import make_documents
from tests.data_scoring.odd_engines import DeadlyEngine, TwiceEngine


@pytest.fixture
def tokenizer(tiny_corpus: Corpus) -> Tokenizer:
    return open_tokenizer(tiny_corpus.tokenizer_path, None)


@pytest.fixture
def source(tmp_path: Path) -> SourceConfig:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_documents(3000)))
    return SourceConfig(name="text", path=str(path))


def counts_by_library(corpus: Corpus, texts: list[str]) -> list[int]:
    """Return how often each token occurs in `texts`, told by the library alone."""
    library = tokenizers.Tokenizer.from_file(str(corpus.tokenizer_path))
    counter = Counter(token for text in texts for token in library.encode(text).ids)
    return [counter[token] for token in range(corpus.vocab_size)]


def test_a_prepared_corpus_is_counted_as_it_lies(
    tiny_corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_scoring.corpus.token_counts, "_LEAST_TOKENS", 50 * 32)
    reports: list[tuple[str, int, int | None]] = []

    def report(what: str, done: int, total: int | None) -> None:
        reports.append((what, done, total))

    sources = count_corpus(tiny_corpus, tokenizer.end_of_document, tmp_path, engine, report)
    assert {report[::2] for report in reports} == {("counting the corpus (shards)", 3)}
    done = [report[1] for report in reports]
    assert done == sorted(done)
    assert done[-1] == 3
    # The counts of the parts are of no use any more.
    assert len([*tmp_path.iterdir()]) == 1
    found = {source.name: source.counts for source in sources}
    assert sorted(found) == ["one", "two"]
    # The shards' files hold nothing but the samples' tokens.
    files = [part["prefix"] for entry in tiny_corpus.manifest["shards"] for part in entry["parts"]]
    tokens = np.concatenate([np.fromfile(tiny_corpus.folder / f"{name}.bin", np.uint16) for name in files])
    expected = np.bincount(tokens, minlength=tiny_corpus.vocab_size)
    expected[tokenizer.end_of_document] = 0
    assert sum(found.values()).tolist() == expected.tolist()
    trained = {entry["name"]: entry["train_tokens"] for entry in tiny_corpus.manifest["sources"]}
    assert 0.9 * trained["one"] < found["one"].sum() < trained["one"]
    documents = make_documents(120, 1)
    texts = list(texts_of(tiny_corpus, "one", tokenizer, 2000, seed=3))
    assert sum(map(len, texts[:-1])) <= 2000 < sum(map(len, texts))
    # Those that no document ends in.
    assert any(text in document for text in texts for document in documents)
    assert list(texts_of(tiny_corpus, "one", tokenizer, 2000, seed=3)) == texts


def test_a_count_of_a_corpus_goes_on_with_the_parts_that_are_left(
    tiny_corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_scoring.corpus.token_counts, "_LEAST_TOKENS", 20 * 32)

    def count(name: str, engine: Engine) -> list[list[int]]:
        sources = count_corpus(tiny_corpus, tokenizer.end_of_document, tmp_path / name, engine, silent)
        return [source.counts.tolist() for source in sources]

    expected = count("whole", LocalEngine(1))
    with (
        DeadlyEngine(3, tmp_path / "killed") as engine,
        pytest.raises(ValueError, match="a process of the pool was killed"),
    ):
        count("counts", engine)
    files = [*(tmp_path / "counts").glob("corpus-*.npz")]
    assert len(files) > 2
    read: list[int] = []

    def read_samples(corpus: Corpus, shards: Any, samples: Any) -> Any:
        read.append(len(samples))
        return reading(corpus, shards, samples)

    reading = Corpus.read
    monkeypatch.setattr(Corpus, "read", read_samples)
    assert count("counts", LocalEngine(1)) == expected
    # All but what the files hold, and then nothing.
    assert len(read) == len(data_scoring.corpus.token_counts._divide(tiny_corpus)) - len(files)
    read.clear()
    assert count("counts", LocalEngine(1)) == expected
    assert read == []
    with TwiceEngine() as engine:
        assert count("twice", engine) == expected


def test_samples_are_found_whatever_the_folder_is_called(
    tiny_corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    expected = list(texts_of(tiny_corpus, "two", tokenizer, 2000, seed=3))
    for name in ("source=one", "shard=0", "corpus[1]", "corpus*", "it's"):
        shutil.copytree(tiny_corpus.folder, tmp_path / name)
        assert list(texts_of(Corpus(tmp_path / name), "two", tokenizer, 2000, seed=3)) == expected


def test_lengths_are_measured_on_all_or_on_a_sample(tiny_corpus: Corpus, tokenizer: Tokenizer) -> None:
    class Letters:
        """One token a byte."""

        vocab_size, end_of_document = 256, 0

        def encode_batch(self, texts: list[str]) -> list[list[int]]:
            return [list(text.encode()) for text in texts]

        def decode(self, ids: list[int]) -> str:
            return bytes(ids).decode()

    texts = make_documents(50)
    length = measure_length("a", iter(texts), (tokenizer, Letters()), 1 << 20, 0)
    num_bytes = len("".join(texts).encode())
    assert (length.num_bytes, length.tokens_after, length.is_sample) == (num_bytes, num_bytes, False)
    assert length.tokens_before == sum(counts_by_library(tiny_corpus, texts))
    sample = measure_length("a", iter(texts), (tokenizer, Letters()), 2000, 0)
    assert sample.is_sample
    assert 1500 < sample.num_bytes == sample.tokens_after <= 2000

    class Deaf(Letters):
        def decode(self, ids: list[int]) -> str:
            return ""

    with pytest.raises(ValueError, match=r"^a: the smaller tokenizer does not decode this text as the original one"):
        measure_length("a", iter(texts), (tokenizer, Deaf()), 2000, 0)
