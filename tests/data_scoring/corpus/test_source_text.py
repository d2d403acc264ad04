"""Sources are read and parsed once, whatever a try ends with, and the corpus is the same."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_scoring.base.progress import silent
from data_scoring.config import CorpusConfig, SourceConfig, TokenizerConfig
from data_scoring.corpus import sources
from data_scoring.corpus.prepare_corpus import prepare_corpus
from data_scoring.corpus.source_text import SourceText
from tests.conftest import make_documents

TOKENIZER = TokenizerConfig(vocab_size=300, train_megabytes=0.01)


@pytest.fixture
def texts(tmp_path: Path) -> CorpusConfig:
    lines = [json.dumps({"text": document}) for document in [*make_documents(2500, 1), " "]]
    lines.insert(40, "no JSON")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (tmp_path / "b.txt").write_text("\n\n".join(make_documents(1500, 2)))
    values = [
        {"name": "a", "path": str(tmp_path / "a.jsonl.gz")},
        {"name": "b", "path": str(tmp_path / "b.txt"), "document": "paragraph"},
    ]
    return CorpusConfig.model_validate({"sources": values, "seq_length": 16, "num_shards": 2, "on_bad_record": "skip"})


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many records were read of each file."""
    counts: dict[str, int] = {}
    reading = sources._reading

    def count(source: SourceConfig, file: str, rows: Iterator[object]) -> Iterator[object]:
        for row in reading(source, file, rows):
            name = Path(file).name
            counts[name] = counts.get(name, 0) + 1
            yield row

    monkeypatch.setattr(sources, "_reading", count)
    return counts


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def end_at(what: str, least: int = 0) -> object:
    """Return a progress that raises KeyboardInterrupt when so much is done of what is begun with `what`."""

    def note(doing: str, done: int, total: int | None) -> None:
        if doing.startswith(what) and done >= least:
            raise KeyboardInterrupt

    return note


def test_sources_are_read_once(texts: CorpusConfig, tmp_path: Path, read: dict[str, int]) -> None:
    prepare_corpus(texts, TOKENIZER, 5, tmp_path / "trained", "f", silent)
    assert read == {"a.jsonl.gz": 2502, "b.txt": 1500}
    given = TokenizerConfig(path=str(tmp_path / "trained" / "tokenizer.json"))
    prepare_corpus(texts, given, 5, tmp_path / "given", "f", silent)
    assert read == {"a.jsonl.gz": 2 * 2502, "b.txt": 2 * 1500}
    assert contents(tmp_path / "trained") == contents(tmp_path / "given")
    manifest = json.loads((tmp_path / "trained" / "manifest.json").read_text())
    assert [(each["documents"], each["empty"], each["rejected"]) for each in manifest["sources"]] == [
        (2500, 1, 1), (1500, 0, 0),
    ]  # fmt: skip
    assert len((tmp_path / "trained" / "rejects.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("progress", "again"),
    [
        # What is read is kept once all of a source is.
        (end_at("sampling a", 2000), {"a.jsonl.gz": 2502, "b.txt": 1500}),
        (end_at("sampling b", 1000), {"b.txt": 1500}),
        (end_at("tokenising a"), {}),
        (end_at("tokenising b"), {}),
    ],
)
def test_what_was_read_is_not_read_again_after_a_kill(
    texts: CorpusConfig, tmp_path: Path, read: dict[str, int], progress: object, again: dict[str, int]
) -> None:
    prepare_corpus(texts, TOKENIZER, 5, tmp_path / "unbroken", "f", silent)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(texts, TOKENIZER, 5, tmp_path / "broken", "f", progress)
    # A kill leaves what an interrupt cleans up.
    leftover = tmp_path / "broken" / "staging" / ".a.text.arrow.1.tmp"
    leftover.write_bytes(b"half")
    read.clear()

    def looked(doing: str, done: int, total: int | None) -> None:
        assert not leftover.exists()

    prepare_corpus(texts, TOKENIZER, 5, tmp_path / "broken", "f", looked)
    assert read == again
    assert contents(tmp_path / "broken") == contents(tmp_path / "unbroken")


@pytest.mark.parametrize("name", ["b.text.arrow", "a.tokens", "a.json"])
def test_a_staged_file_that_is_damaged_is_not_used(texts: CorpusConfig, tmp_path: Path, name: str) -> None:
    prepare_corpus(texts, TOKENIZER, 5, tmp_path / "unbroken", "f", silent)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(texts, TOKENIZER, 5, tmp_path / "broken", "f", end_at("tokenising b"))
    path = tmp_path / "broken" / "staging" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 2
    path.write_bytes(content)
    if path.suffix == ".json":
        with pytest.raises(ValueError, match=f"{path}: .*delete it and run the same command again"):
            prepare_corpus(texts, TOKENIZER, 5, tmp_path / "broken", "f", silent)
        path.unlink()
    prepare_corpus(texts, TOKENIZER, 5, tmp_path / "broken", "f", silent)
    assert contents(tmp_path / "broken") == contents(tmp_path / "unbroken")


def test_kept_text_is_gone_once_it_is_tokenised(texts: CorpusConfig, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(texts, TOKENIZER, 5, tmp_path / "corpus", "f", end_at("tokenising b"))
    assert sorted(path.name for path in (tmp_path / "corpus" / "staging").glob("*.arrow")) == ["b.text.arrow"]


def test_a_source_that_has_changed_is_read_again(texts: CorpusConfig, tmp_path: Path, read: dict[str, int]) -> None:
    text = SourceText(texts.sources[1], tmp_path, skip_bad=True)
    before = list(text.documents(keep=True))
    assert list(text.documents()) == before
    assert [document.text for document in before] == make_documents(1500, 2)
    assert {document.file for document in before} == {str(tmp_path / "b.txt")}
    assert [document.number for document in before] == list(range(1, 1501))
    assert read == {"b.txt": 1500}
    (tmp_path / "b.txt").write_text("another\n\ntext")
    assert [document.text for document in text.documents()] == ["another", "text"]
    first = next(SourceText(texts.sources[0], tmp_path, skip_bad=True).documents())
    assert [first.text] == make_documents(1, 1)


def test_kept_text_is_compressed(texts: CorpusConfig, tmp_path: Path) -> None:
    text = SourceText(texts.sources[1], tmp_path, skip_bad=True)
    num_bytes = sum(len(document.text.encode()) for document in text.documents(keep=True))
    [kept] = tmp_path.glob("*.arrow")
    assert kept.stat().st_size < num_bytes
