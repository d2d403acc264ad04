"""Tokenising sources: long documents as one text, lost characters counted, documents that cannot be encoded."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from data_scoring.base.progress import silent
from data_scoring.config import CorpusConfig, SourceConfig, TokenizerConfig
from data_scoring.corpus.corpus import Corpus
from data_scoring.corpus.indexed import token_dtype
from data_scoring.corpus.prepare_corpus import prepare_corpus
from data_scoring.corpus.source_parts import cut_source
from data_scoring.corpus.sources import find_source, look_at_files
from data_scoring.corpus.tokenise import StagedPart, TokenizerFile, tokenise_part
from data_scoring.tokenizer.tokenizer import open_tokenizer
from tests.conftest import make_documents
from tests.data_scoring.tokenizer.tokenizer_kinds import encode_by_library, make_kind


def prepare(folder: Path, documents: list[str], tokenizer: Path, on_bad_record: str = "fail") -> Corpus:
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    fields = {"sources": [{"name": "a", "path": str(folder / "a.jsonl")}], "seq_length": 64, "num_shards": 1}
    config = CorpusConfig.model_validate({**fields, "on_bad_record": on_bad_record, "validation_fraction": 0.001})
    prepare_corpus(config, TokenizerConfig(path=str(tokenizer)), 5, folder / "corpus", "fingerprint", silent)
    return Corpus(folder / "corpus")


@pytest.mark.parametrize(
    ("kind", "separator"),
    [
        ("byte-level", "b"), ("byte-level", "\n\n"), ("byte-level-prefix-space", "\n"), ("metaspace-always", " "),
        ("llama", "b"), ("sp-bpe-bytes", "\n"),
    ],
)  # fmt: skip
def test_a_document_of_a_million_characters_has_the_ids_of_one_text(kind: str, separator: str, tmp_path: Path) -> None:
    path = make_kind(kind, tmp_path)
    document = separator.join("the model" for _ in range(110_000))
    assert len(document) > 1 << 20
    tokenizer = open_tokenizer(path, None)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": document}) + "\n" + json.dumps({"text": "another"}))
    source = SourceConfig(name="a", path=str(tmp_path / "a.jsonl"))
    [part] = cut_source(source, "jsonl", look_at_files(find_source(source)), 1 << 30)
    file = TokenizerFile(path, None, "checksum")
    counts = tokenise_part(part, lambda done: None, staging=tmp_path, tokenizer=file, skip_bad=False)
    assert (counts["documents"], counts["read"], counts["num_lines"]) == (2, 2, 2)
    staged = StagedPart("a", tmp_path / part.name, counts)
    end = tokenizer.end_of_document
    expected = [*encode_by_library(path, document), end, *encode_by_library(path, "another"), end]
    assert np.fromfile(staged.path("tokens"), token_dtype(tokenizer.vocab_size)).tolist() == expected


def save(folder: Path, model: Any) -> Path:
    tokenizer = Tokenizer(model)
    if isinstance(model, models.WordLevel | models.WordPiece):
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "t.json"))
    return folder / "t.json"


_IDS = {token: number for number, token in enumerate(["</s>", *sorted({*"".join(make_documents(40))})])}
_WORDS = {word: number for number, word in enumerate(["</s>", *sorted({*" ".join(make_documents(40)).split()})])}
_CANNOT = {
    "unigram": lambda: models.Unigram([(token, -2.0) for token in _IDS], unk_id=None),
    "word-level": lambda: models.WordLevel(_WORDS, unk_token="[UNK]"),
    "word-piece": lambda: models.WordPiece(_WORDS, unk_token="[UNK]"),
    "bpe": lambda: models.BPE(_IDS, [], unk_token="[UNK]"),
}


@pytest.mark.parametrize("kind", _CANNOT)
def test_documents_that_a_tokenizer_cannot_encode_are_bad_records(kind: str, tmp_path: Path) -> None:
    path = save(tmp_path, _CANNOT[kind]())
    documents = make_documents(40)
    documents[7:7] = [" ", "北京"]
    documents[20:20] = ["the 北京 model"]
    with pytest.raises(
        ValueError, match=r"^corpus\.sources\.a: document 9 of '.*a\.jsonl': .*\(.+\).* or set"
    ) as error:
        prepare(tmp_path, documents, path)
    assert "\n" not in str(error.value) and "set tokenizer.path to one with" in str(error.value)
    corpus = prepare(tmp_path, documents, path, "skip")
    [source] = corpus.manifest["sources"]
    assert (source["documents"], source["empty"], source["rejected"]) == (40, 1, 2)
    rejects = [json.loads(line) for line in (corpus.folder / "rejects.jsonl").read_text().splitlines()]
    assert [reject["line"] for reject in rejects] == [9, 21]
    assert "lost_characters" not in source
    with pytest.raises(ValueError, match=r"corpus\.sources\.a\.path: has no text \(2 bad records .*document 1: "):
        (tmp_path / "other").mkdir()
        prepare(tmp_path / "other", ["北京", "市"], path, "skip")


@pytest.mark.parametrize("kind", ["dropping", "metaspace-first", "unigram", "sp-bpe", "sp-unigram"])
def test_lost_characters_are_counted_told_and_an_error_above_a_tenth(kind: str, tmp_path: Path) -> None:
    path = make_kind(kind, tmp_path)
    documents = make_documents(40)
    odd = ["the 北京 model of the text", "北 the model of the text"]
    corpus = prepare(tmp_path, [*documents, *odd], path)
    [source] = corpus.manifest["sources"]
    assert source["lost_characters"] == 3
    assert source["characters"] == sum(map(len, [*documents, *odd]))
    [note] = corpus.notes
    assert "corpus.sources.a: the tokenizer lost 3 of" in note and "'北京'" in note
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"corpus\.sources\.a: .* cannot represent 120 of its \d+ char.* '北京市'"):
        prepare(tmp_path / "other", [*documents[:2], "北京市" * 40], path)


def test_the_wrong_tokenizer_is_noticed_before_the_next_source_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "北京市" * 40}))
    (tmp_path / "b.jsonl").write_text("no JSON")
    sources = [{"name": name, "path": str(tmp_path / f"{name}.jsonl")} for name in "ab"]
    tokenizer = TokenizerConfig(path=str(make_kind("sp-bpe", tmp_path)))
    with pytest.raises(ValueError, match=r"corpus\.sources\.a: .* cannot represent 120 of its 120 characters"):
        prepare_corpus(CorpusConfig.model_validate({"sources": sources}), tokenizer, 5, tmp_path / "c", "f", silent)


@pytest.mark.parametrize("kind", ["byte-level", "llama", "sp-bpe-bytes"])
def test_a_corpus_without_lost_characters_has_the_manifest_that_it_had(kind: str, tmp_path: Path) -> None:
    corpus = prepare(tmp_path, [*make_documents(40), "北京市 🦄"], make_kind(kind, tmp_path))
    assert corpus.notes == []
    assert {*corpus.manifest["sources"][0]} == {
        "documents", "empty", "rejected", "bytes", "name", "duplicates", "validation_documents", "train_tokens",
        "validation_tokens",
    }  # fmt: skip
