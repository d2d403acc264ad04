"""Sources are read and parsed once, whatever a try ends with, and the corpus is the same."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_scoring.base.files import checksum
from data_scoring.base.progress import silent
from data_scoring.config import CorpusConfig, SourceConfig, TokenizerConfig
from data_scoring.corpus import prepare_corpus as preparing
from data_scoring.corpus import sources
from data_scoring.corpus.documents import Document
from data_scoring.corpus.part_text import PartText
from data_scoring.corpus.prepare_corpus import prepare_corpus
from data_scoring.corpus.source_parts import SourcePart, cut_source
from data_scoring.corpus.sources import find_source, look_at_files
from data_scoring.tokenizer.tokenizer import TextSample
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
        # What is read is kept once all of a part is.
        (end_at("sampling", 2000), {"a.jsonl.gz": 2502, "b.txt": 1500}),
        (end_at("sampling", 3501), {"b.txt": 1500}),
        (end_at("tokenising"), {}),
        (end_at("tokenising", 2501), {}),
        (end_at("looking"), {}),
        (end_at("packing"), {}),
        (end_at("writing shards"), {}),
    ],
)
def test_what_was_read_is_not_read_again_after_a_kill(
    texts: CorpusConfig, tmp_path: Path, read: dict[str, int], progress: object, again: dict[str, int]
) -> None:
    prepare_corpus(texts, TOKENIZER, 5, tmp_path / "unbroken", "f", silent)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(texts, TOKENIZER, 5, tmp_path / "broken", "f", progress)
    # A kill leaves what an interrupt cleans up.
    leftover = tmp_path / "broken" / "staging" / ".a.00000.text.arrow.1.tmp"
    leftover.write_bytes(b"half")
    read.clear()

    def looked(doing: str, done: int, total: int | None) -> None:
        assert not leftover.exists()

    prepare_corpus(texts, TOKENIZER, 5, tmp_path / "broken", "f", looked)
    assert read == again
    assert contents(tmp_path / "broken") == contents(tmp_path / "unbroken")


def test_a_kill_while_checksums_are_computed_costs_no_text(
    texts: CorpusConfig, tmp_path: Path, read: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(path: Path) -> str:
        if path.name == "samples.parquet":
            raise KeyboardInterrupt
        return checksum(path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(preparing, "checksum", end)
        prepare_corpus(texts, TOKENIZER, 5, tmp_path / "broken", "f", silent)
    read.clear()
    prepare_corpus(texts, TOKENIZER, 5, tmp_path / "broken", "f", silent)
    assert read == {}
    assert not (tmp_path / "broken" / "staging").exists()


def test_bad_records_are_those_of_the_configuration_after_a_try_with_another_one(
    texts: CorpusConfig, tmp_path: Path
) -> None:
    """The other one fails after it has listed its own."""
    prepare_corpus(texts, TOKENIZER, 5, tmp_path / "unbroken", "f", silent)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(texts, TOKENIZER, 5, tmp_path / "broken", "f", end_at("writing shards"))
    other = texts.model_copy(update={"sources": texts.sources[1:], "num_shards": 60_000})
    with pytest.raises(ValueError, match="for 60000 shards"):
        prepare_corpus(other, TOKENIZER, 5, tmp_path / "broken", "f", silent)
    prepare_corpus(texts, TOKENIZER, 5, tmp_path / "broken", "f", silent)
    assert contents(tmp_path / "broken") == contents(tmp_path / "unbroken")


@pytest.mark.parametrize("name", ["b.00000.text.arrow", "a.00000.tokens", "a.00000.digests", "a.00000.json"])
def test_a_staged_file_that_is_damaged_is_not_used(texts: CorpusConfig, tmp_path: Path, name: str) -> None:
    prepare_corpus(texts, TOKENIZER, 5, tmp_path / "unbroken", "f", silent)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(texts, TOKENIZER, 5, tmp_path / "broken", "f", end_at("tokenising", 2501))
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
        prepare_corpus(texts, TOKENIZER, 5, tmp_path / "corpus", "f", end_at("tokenising", 2501))
    assert sorted(path.name for path in (tmp_path / "corpus" / "staging").glob("*.arrow")) == [
        "b.00000.sample.arrow", "b.00000.text.arrow",
    ]  # fmt: skip


def part_of(source: SourceConfig) -> SourcePart:
    found = find_source(source)
    [part] = cut_source(source, found.kind, look_at_files(found), 1 << 30)
    return part


def documents_of(source: SourceConfig, folder: Path) -> list[Document]:
    return list(PartText(part_of(source), folder, skip_bad=True).documents(folder / "rejects"))


def keep(source: SourceConfig, folder: Path) -> None:
    PartText(part_of(source), folder, skip_bad=True).keep(1000, 10**6, 1, lambda done: None)


def test_a_source_that_has_changed_is_read_again(texts: CorpusConfig, tmp_path: Path, read: dict[str, int]) -> None:
    source = texts.sources[1]
    keep(source, tmp_path)
    kept = documents_of(source, tmp_path)
    assert [document.text for document in kept] == make_documents(1500, 2)
    assert {document.file for document in kept} == {str(tmp_path / "b.txt")}
    assert [document.number for document in kept] == list(range(1, 1501))
    assert read == {"b.txt": 1500}
    (tmp_path / "b.txt").write_text("another\n\ntext")
    assert [document.text for document in documents_of(source, tmp_path)] == ["another", "text"]


@pytest.mark.parametrize("kept", [False, True])
def test_a_file_that_changes_while_it_is_read_is_an_error(texts: CorpusConfig, tmp_path: Path, kept: bool) -> None:
    """Its parts would be of different text."""
    source = texts.sources[1]
    text = PartText(part_of(source), tmp_path, skip_bad=True)
    with (tmp_path / "b.txt").open("a") as file:
        file.write("more")
    with pytest.raises(ValueError, match=rf"corpus\.sources\.b\.path: '{tmp_path}/b\.txt' changed while it was read"):
        text.keep(1000, 10**6, 1, lambda done: None) if kept else list(text.documents(tmp_path / "rejects"))
    assert not (tmp_path / "b.00000.text.json").exists()
    (tmp_path / "b.txt").unlink()
    with pytest.raises(ValueError, match=rf"corpus\.sources\.b\.path: '{tmp_path}/b\.txt' cannot be read"):
        list(text.documents(tmp_path / "rejects"))


def test_kept_text_is_compressed_and_bad_records_are_listed_again(texts: CorpusConfig, tmp_path: Path) -> None:
    keep(texts.sources[0], tmp_path)
    text = PartText(part_of(texts.sources[0]), tmp_path, skip_bad=True)
    num_bytes = sum(len(document.text.encode()) for document in text.documents(tmp_path / "rejects"))
    assert (tmp_path / "a.00000.text.arrow").stat().st_size < num_bytes
    [reject] = (tmp_path / "rejects").read_text().splitlines()
    assert json.loads(reject)["line"] == 41
    assert text.num_lines == 2502


def test_a_sample_is_of_all_parts_and_uniform(tmp_path: Path) -> None:
    """The keys of a part are random numbers, and the largest ones of all parts make the sample."""
    (tmp_path / "c.txt").write_text("\n".join(f"{number:09d}" for number in range(40_000)))
    source = SourceConfig(name="c", path=str(tmp_path / "c.txt"), document="line")
    [file] = look_at_files(find_source(source))
    parts = cut_source(source, "text", [file], 100_000)
    assert len(parts) == 4
    sample = TextSample(90_000)
    for part in parts:
        text = PartText(part, tmp_path, skip_bad=False)
        text.keep(90_000, file.num_bytes, 5, lambda done: None)
        for key, each in text.sampled():
            sample.add(key, each)
    numbers = np.array([int(text) for _, text in sample.entries()])
    assert len(numbers) == 10_000 and (np.diff(numbers) > 0).all()
    # Binomial: 2500 of 10 000 in each quarter, deviation 43.
    assert np.abs(np.histogram(numbers, 4, (0, 40_000))[0] - 2500).max() < 5 * 43
