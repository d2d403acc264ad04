"""Token counts of sources: part by part, by any engine, and resumed after a kill."""

import json
from collections import Counter
from pathlib import Path

import pytest
import tokenizers

from data_scoring.base.engine import Engine, LocalEngine
from data_scoring.base.progress import Progress, silent
from data_scoring.config import SourceConfig
from data_scoring.corpus import source_parts, source_token_counts
from data_scoring.corpus.corpus import Corpus
from data_scoring.corpus.source_token_counts import count_sources
from data_scoring.corpus.tokenise import TokenizerFile
from data_scoring.tokenizer.tokenizer import Tokenizer
from tests.conftest import make_documents
from tests.data_scoring.odd_engines import TwiceEngine


class KilledError(Exception):
    """What ends a count in the middle."""


@pytest.fixture
def file(tiny_corpus: Corpus) -> TokenizerFile:
    return TokenizerFile(tiny_corpus.tokenizer_path, None, "t")


@pytest.fixture
def source(tmp_path: Path) -> SourceConfig:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_documents(3000)))
    return SourceConfig(name="text", path=str(path))


def counts_by_library(path: Path, texts: list[str], size: int) -> list[int]:
    """Return how often each token occurs in `texts`, told by the library alone."""
    library = tokenizers.Tokenizer.from_file(str(path))
    counter = Counter(token for text in texts for token in library.encode(text).ids)
    return [counter[token] for token in range(size)]


def count(
    source: SourceConfig,
    file: TokenizerFile,
    folder: Path,
    progress: Progress = silent,
    skip_bad: bool = False,
    engine: Engine | None = None,
) -> list[int]:
    [found] = count_sources([source], file, folder, skip_bad, engine or LocalEngine(1), progress)
    assert found.name == source.name
    return found.counts.tolist()


def test_a_count_that_is_ended_goes_on_where_it_was(
    file: TokenizerFile, source: SourceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = file.open().vocab_size
    expected = counts_by_library(file.path, make_documents(3000), size)
    monkeypatch.setattr(source_token_counts, "_SAVE_SECONDS", 0.0)

    def kill(what: str, done: int, total: int | None) -> None:
        if done >= 2048:
            raise KilledError

    folder = tmp_path / "counts"
    with pytest.raises(KilledError):
        count(source, file, folder, kill)
    encoded: list[str] = []
    whole = source_token_counts.encode_each

    def encode_each(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
        encoded.extend(texts)
        return whole(tokenizer, texts)

    monkeypatch.setattr(source_token_counts, "encode_each", encode_each)
    assert count(source, file, folder) == expected
    # The batch that was lost with the kill, and what came after it.
    assert encoded == make_documents(3000)[1024:]
    # Once complete, it is not counted again, unless the tokenizer or the text is another.
    assert count(source, file, folder) == expected
    assert len(encoded) == 3000 - 1024
    other = TokenizerFile(file.path, None, "u")
    assert count(source, other, folder) == expected
    assert len(encoded) == 3000 - 1024 + 3000
    Path(source.path).write_text(json.dumps({"text": "the model"}) + "\n")
    changed = counts_by_library(file.path, ["the model"], size)
    assert count(source, other, folder) == changed
    # What is no counts file, or a part of one, is of no use, and in nobody's way.
    for content in (b"junk", b""):
        for path in folder.glob("text.*.npz"):
            path.write_bytes(content)
        assert count(source, other, folder) == changed
    assert list(folder.glob(".*")) == []


def test_a_source_without_text_and_a_bad_record_are_named(
    file: TokenizerFile, source: SourceConfig, tmp_path: Path
) -> None:
    Path(source.path).write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match=r"corpus.sources.text.path: holds no text"):
        count(source, file, tmp_path / "counts")
    Path(source.path).write_text('{"text": "a"}\n{"text": 1}\n')
    with pytest.raises(ValueError, match=r"text.jsonl:2: field 'text' is int"):
        count(source, file, tmp_path / "counts")
    assert sum(count(source, file, tmp_path / "counts", skip_bad=True)) == 1


def test_parts_and_engines_change_nothing(
    file: TokenizerFile, source: SourceConfig, tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = count(source, file, tmp_path / "whole")
    monkeypatch.setattr(source_parts, "_SMALLEST_PART_BYTES", 30_000)
    assert count(source, file, tmp_path / "parts", engine=engine) == expected
    assert len(list((tmp_path / "parts").glob("*.npz"))) > 5
    assert count(source, file, tmp_path / "twice", engine=TwiceEngine()) == expected


def test_bad_records_and_documents_are_listed_with_their_place_in_the_source(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents are numbered without bad records, lines with them, through all parts."""
    texts = make_documents(300)
    words = {word: number for number, word in enumerate(["</s>", *sorted({*" ".join(texts).split()})])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "t.json"))
    file = TokenizerFile(tmp_path / "t.json", None, "t")
    texts[200], texts[280] = "北京", "市"
    lines = [json.dumps({"text": text}) for text in texts]
    lines[250] = "no JSON"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    source = SourceConfig(name="a", path=str(tmp_path / "a.jsonl"))
    monkeypatch.setattr(source_parts, "_SMALLEST_PART_BYTES", 5000)
    with pytest.raises(ValueError, match=r"^corpus\.sources\.a: document 201 of '.*a\.jsonl': "):
        count(source, file, tmp_path / "counts", engine=engine)
    count(source, file, tmp_path / "counts", skip_bad=True, engine=engine)
    rejects = [json.loads(line) for line in (tmp_path / "counts" / "a.rejects.jsonl").read_text().splitlines()]
    assert [reject["line"] for reject in rejects] == [201, 251, 280]
    assert [reject["reason"].partition(":")[0] for reject in rejects if "document" in reject["reason"]] == [
        "document 201", "document 280",
    ]  # fmt: skip
