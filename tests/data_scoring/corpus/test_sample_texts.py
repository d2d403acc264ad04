"""Texts and origins of samples, compared with what the source files hold at the place that is named."""

import gzip
import json
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece

from data_scoring.base.progress import silent
from data_scoring.config import CorpusConfig, TokenizerConfig
from data_scoring.corpus.corpus import VALIDATION, Corpus
from data_scoring.corpus.indexed import open_indexed
from data_scoring.corpus.prepare_corpus import prepare_corpus
from data_scoring.corpus.sample_texts import COLUMNS, SampleTexts
from data_scoring.tokenizer.tokenizer import Tokenizer, open_tokenizer
from tests.conftest import make_documents
from tests.data_scoring.corpus.test_in_place import write_pair

# Documents by their file and number.
Places = dict[tuple[str, int], str]
# With repetitions, which are dropped, and documents with no text.
DOCUMENTS = [*make_documents(30, 7), *make_documents(10, 7), "  ", "x", "y", "z z", *make_documents(30, 8)]
PARTS = {"b": DOCUMENTS[:40], "a": DOCUMENTS[40:]}


def jsonl(folder: Path) -> tuple[dict[str, Any], Places]:
    """Two files below a folder, one compressed, with blank lines and lines that are no records."""
    places = {}
    for name, texts in PARTS.items():
        lines: list[str] = []
        file = folder / name / ("x.jsonl.gz" if name == "a" else "x.jsonl")
        file.parent.mkdir()
        for number, text in enumerate(texts):
            lines += [*["", "not JSON"][: number % 3], json.dumps({"text": text})]
            places[str(file), len(lines)] = text
        content = "\n".join(lines).encode()
        file.write_bytes(gzip.compress(content) if name == "a" else content)
    return {"path": str(folder)}, places


def json_array(folder: Path) -> tuple[dict[str, Any], Places]:
    """An array on one line."""
    file = folder / "x.json"
    file.write_text(json.dumps([{"text": text} for text in DOCUMENTS]))
    return {"path": str(file)}, {(str(file), number): text for number, text in enumerate(DOCUMENTS, start=1)}


def archive(folder: Path) -> tuple[dict[str, Any], Places]:
    """Two members of an archive."""
    places, file = {}, folder / "x.zip"
    with zipfile.ZipFile(file, "w") as members:
        for name, texts in PARTS.items():
            members.writestr(f"{name}/x.txt", "\n".join(texts))
            places |= {(f"{file}/{name}/x.txt", number): text for number, text in enumerate(texts, start=1)}
    return {"path": str(file), "format": "text", "document": "line"}, places


def paragraphs(folder: Path) -> tuple[dict[str, Any], Places]:
    """Two files, with empty paragraphs, which are not counted."""
    places = {}
    for name, texts in PARTS.items():
        (folder / f"{name}.txt").write_text("\n\n\n\n".join(texts))
        places |= {(str(folder / f"{name}.txt"), number): text for number, text in enumerate(texts, start=1)}
    return {"path": str(folder), "document": "paragraph"}, places


def files(folder: Path) -> tuple[dict[str, Any], Places]:
    """One document a file, of a name that is not ASCII."""
    places = {}
    for number, text in enumerate(DOCUMENTS):
        (folder / f"文-{number}.txt").write_text(text)
        places[str(folder / f"文-{number}.txt"), 1] = text
    return {"path": str(folder)}, places


def parquet(folder: Path) -> tuple[dict[str, Any], Places]:
    """Two files, with rows that are null."""
    places = {}
    for name, texts in PARTS.items():
        rows = [each for text in texts for each in (text, None)]
        pq.write_table(pa.table({"text": rows}), folder / f"{name}.parquet", row_group_size=7)
        places |= {(str(folder / f"{name}.parquet"), 2 * place + 1): text for place, text in enumerate(texts)}
    return {"path": str(folder)}, places


def saved_dataset(folder: Path) -> tuple[dict[str, Any], Places]:
    """A data set that `datasets` has saved."""
    import datasets

    datasets.Dataset.from_dict({"text": DOCUMENTS}).save_to_disk(str(folder / "set"))
    places = {(str(folder / "set"), number): text for number, text in enumerate(DOCUMENTS, start=1)}
    return {"path": str(folder / "set"), "format": "datasets"}, places


def python(folder: Path) -> tuple[dict[str, Any], Places]:
    """Python's library, of modules without and with docstrings."""
    places = {}
    for number, text in enumerate(DOCUMENTS):
        file = folder / f"m{number}.py"
        file.write_text(f'"""{text}"""\n' if number % 3 else "x = 1\n")
        if number % 3:
            places[str(file), 1] = text.strip()
    return {"path": "docstrings", "format": "python"}, places


KINDS = [jsonl, json_array, archive, paragraphs, files, parquet, saved_dataset, python]


def prepare(folder: Path, sources: list[dict[str, Any]], tokenizer: TokenizerConfig, **options: Any) -> SampleTexts:
    config = {"sources": sources, "seq_length": 24, "num_shards": 3, "validation_fraction": 0.2, **options}
    corpus = CorpusConfig.model_validate({"on_bad_record": "skip", **config})
    prepare_corpus(corpus, tokenizer, 5, folder, "f", silent)
    return SampleTexts(folder, 5, None)


def read(corpus: Corpus, shard: int, sample: int) -> list[int]:
    batch = corpus.read(np.array([shard]), np.array([sample]))
    return list(batch.tokens[0, : batch.num_tokens[0] + 1])


def assert_origins(texts: SampleTexts, source: str, tokens_at: Callable[[str, int], list[int]], end: int) -> int:
    """Assert that each sample of `source` has the tokens that lie at its origin; return how many there are."""
    corpus = texts.corpus
    rows = [row for row in pq.read_table(corpus.samples_path).to_pylist() if row["source"] == source]
    origins = texts.origins([row["shard"] for row in rows], [row["sample"] for row in rows])
    for row, origin in zip(rows, origins, strict=True):
        assert origin is not None
        tokens = read(corpus, row["shard"], row["sample"])
        document = tokens_at(origin.file, origin.document)[origin.first_token :]
        assert len(document) > 0
        shared = min(len(document), len(tokens))
        assert tokens[:shared] == document[:shared], (row, origin)
        # Every document but the last one ends in the sample; that may end with it, too.
        assert origin.num_documents == tokens[:-1].count(end) + 1
    return len(rows)


@pytest.mark.parametrize("write", KINDS, ids=lambda write: write.__name__)
def test_samples_are_at_the_place_in_the_file_that_is_named(
    write: Callable[[Path], tuple[dict[str, Any], Places]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").mkdir()
    source, places = write(tmp_path / "text")
    paths = sysconfig.get_paths() | {"stdlib": str(tmp_path / "text")}
    monkeypatch.setattr(sysconfig, "get_paths", lambda *_, **__: paths)
    # Another source has some of the documents first.
    (tmp_path / "first.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS[5:12]))
    sources = [{"name": "first", "path": str(tmp_path / "first.jsonl")}, {"name": "s", **source}]
    texts = prepare(tmp_path / "corpus", sources, TokenizerConfig(vocab_size=300))
    assert texts.corpus.manifest["sources"][1]["duplicates"] > 7  # type: ignore[typeddict-item]
    tokenizer = open_tokenizer(texts.corpus.tokenizer_path, None)

    def tokens_at(file: str, number: int) -> list[int]:
        [ids] = tokenizer.encode_batch([places[file, number]])
        return [*ids, tokenizer.end_of_document]

    assert assert_origins(texts, "s", tokens_at, tokenizer.end_of_document) > 20
    listed = pq.read_table(texts.corpus.documents_path).to_pylist()
    assert len(listed) == sum(
        entry["documents"] - entry["duplicates"] - entry["validation_documents"]  # type: ignore[typeddict-item]
        for entry in texts.corpus.manifest["sources"]
    )
    # Whether the tokenizer was trained on the text, or given, is the same.
    given = TokenizerConfig(path=str(texts.corpus.tokenizer_path))
    again = prepare(tmp_path / "again", sources, given)
    assert again.corpus.documents_path.read_bytes() == texts.corpus.documents_path.read_bytes()
    assert set(again.corpus.files()) >= {again.corpus.documents_path}


@pytest.mark.parametrize("is_reversed", [False, True])
@pytest.mark.parametrize("most", [None, 40])
def test_samples_of_a_corpus_used_in_place_are_at_their_place(
    tmp_path: Path, is_reversed: bool, most: int | None, tiny_corpus: Corpus
) -> None:
    lengths = [0, 5, 40, 1, 0, 0, 77, 3, *([9] * 60)]
    bounds = [0, 1, 2, 2, 5, 5, 6, 8, *range(9, len(lengths) + 1)]
    arrange = (lambda rows: rows[::-1]) if is_reversed else list
    for name in "ab":
        write_pair(tmp_path / name, "uint16", lengths, arrange, bounds, b"head")
    sources = [{"name": name, "path": str(tmp_path / name), "max_documents": most} for name in "ab"]
    texts = prepare(tmp_path / "corpus", sources, TokenizerConfig(path=str(tiny_corpus.tokenizer_path)))
    indexed = open_indexed(tmp_path / "b")

    def tokens_at(file: str, number: int) -> list[int]:
        assert file == str(tmp_path / "b.bin")
        numbers = range(int(indexed.documents[number - 1]), int(indexed.documents[number]))
        return [int(token) for sequence in numbers for token in indexed.sequence(sequence)]

    # Documents do not end with a token of their own here.
    corpus, order = texts.corpus, {}
    rows = [row for row in pq.read_table(corpus.samples_path).to_pylist() if row["source"] == "b"]
    for row, origin in zip(rows, texts.origins([r["shard"] for r in rows], [r["sample"] for r in rows]), strict=True):
        assert origin is not None
        tokens, found, number = read(corpus, row["shard"], row["sample"]), [], origin.document
        start, parts = origin.first_token, 0
        while len(found) < len(tokens):
            part = tokens_at(origin.file, number)[start:]
            found, number, start, parts = [*found, *part], number + 1, 0, parts + bool(part)
        assert found[: len(tokens)] == tokens
        assert parts == origin.num_documents
        order[origin.document, origin.first_token] = row
    assert len(order) == len(rows) > 10


@pytest.mark.parametrize("is_file_each", [False, True])
def test_origins_take_less_than_sixteen_bytes_a_document(tmp_path: Path, is_file_each: bool) -> None:
    texts = [f"{number} {'word ' * (number % 7)}" for number in range(1000)]
    (tmp_path / "text").mkdir()
    if is_file_each:
        for number, text in enumerate(texts):
            (tmp_path / "text" / f"document-{number:05d}.txt").write_text(text)
    else:
        (tmp_path / "text" / "x.txt").write_text("\n".join(texts))
    source = {"name": "s", "path": str(tmp_path / "text"), "document": "file" if is_file_each else "line"}
    corpus = prepare(tmp_path / "corpus", [source], TokenizerConfig(vocab_size=280)).corpus
    metadata = pq.ParquetFile(corpus.documents_path).metadata
    assert metadata.num_rows > 700
    assert corpus.documents_path.stat().st_size < 16 * metadata.num_rows


CHINESE = [f"{number} 今天天气很好，我们去公园散步。🙂 {'𠀀龘' * (number % 5)}" for number in range(60)]


def _byte_fallback(folder: Path) -> TokenizerConfig:
    """A SentencePiece model that knows no Chinese character as a whole."""
    (folder / "train.txt").write_text("\n".join(make_documents(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "train.txt"), model_prefix=str(folder / "sp"), vocab_size=400, byte_fallback=True,
        hard_vocab_limit=False, normalization_rule_name="identity", minloglevel=9,
    )  # fmt: skip
    return TokenizerConfig(path=str(folder / "sp.model"))


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_text_that_is_cut_inside_a_character_is_decoded(tmp_path: Path, kind: str) -> None:
    (tmp_path / "x.txt").write_text("\n".join(CHINESE))
    tokenizer = TokenizerConfig(vocab_size=257) if kind == "byte level" else _byte_fallback(tmp_path)
    source = {"name": "s", "path": str(tmp_path / "x.txt"), "document": "line"}
    texts = prepare(tmp_path / "corpus", [source], tokenizer, seq_length=16)
    shards = [shard for shard in range(3) for _ in range(texts.corpus.num_samples(shard))]
    samples = [sample for shard in range(3) for sample in range(texts.corpus.num_samples(shard))]
    found = texts.texts(shards, samples)
    assert sum("\N{REPLACEMENT CHARACTER}" in text for text in found) > 20
    whole = [
        (CHINESE[origin.document - 1], text.strip())
        for text, origin in zip(found, texts.origins(shards, samples), strict=True)
        if origin is not None and origin.num_documents == 1 and "\N{REPLACEMENT CHARACTER}" not in text
    ]
    assert len(whole) > 5
    assert all(text in f"{document}<|endoftext|>" for document, text in whole)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> SampleTexts:
    folder = tmp_path_factory.mktemp("opened")
    (folder / "x.txt").write_text("\n".join(make_documents(100)))
    source = {"name": "s", "path": str(folder / "x.txt"), "document": "line"}
    return prepare(folder / "corpus", [source], TokenizerConfig(vocab_size=280))


@pytest.fixture
def connection(opened: SampleTexts) -> Any:
    with duckdb.connect() as connection:
        connection.execute(f"create view samples as from '{opened.corpus.samples_path}'")
        opened.register(connection)
        yield connection


class _Counting:
    """A tokenizer that counts the texts that it decodes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self.count = tokenizer, 0

    def decode_batch(self, batch: list[list[int]]) -> list[str]:
        self.count += len(batch)
        return self._tokenizer.decode_batch(batch)


def test_sql_has_the_text_and_the_origin(opened: SampleTexts, connection: duckdb.DuckDBPyConnection) -> None:
    relation = connection.sql("from sample_texts where shard = 1 and sample = 3")
    assert relation.columns == list(COLUMNS)
    [row] = relation.fetchall()
    [text], [origin] = opened.texts([1], [3]), opened.origins([1], [3])
    assert origin is not None
    assert row[4:] == (text, *origin)
    tokenizer = open_tokenizer(opened.corpus.tokenizer_path, None)
    assert text == tokenizer.decode(read(opened.corpus, 1, 3))
    query = "select sample_text(s, 3), sample_origin(s, 3).file from (values (null), (1), (-1)) t(s)"
    [validation] = opened.texts([VALIDATION], [3])
    assert connection.sql(query).fetchall() == [(None, None), (text, origin.file), (validation, None)]
    kinds = {name: comment.rpartition("(")[2].rstrip(")") for name, comment in COLUMNS.items()}
    described = {row[0]: row[1].lower() for row in connection.sql("describe sample_texts").fetchall()}
    assert described == kinds


def test_sql_decodes_only_the_rows_of_the_result(
    opened: SampleTexts, connection: duckdb.DuckDBPyConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = _Counting(open_tokenizer(opened.corpus.tokenizer_path, None))
    monkeypatch.setitem(opened.__dict__, "_tokenizer", counting)
    for sql, count in (
        ("select sample_text(shard, sample) from (from samples order by num_tokens, sample, shard limit 5)", 5),
        ("select text from sample_texts where shard = 1 and sample between 2 and 4", 3),
        ("select count(*) from sample_texts", 0),
        ("select file, document from sample_texts", 0),
    ):
        counting.count = 0
        connection.sql(sql).fetchall()
        assert counting.count == count, sql


@pytest.mark.parametrize(("shard", "sample"), [(0, 10_000), (0, -1), (3, 0), (-2, 0)])
@pytest.mark.parametrize("function", ["sample_text", "sample_origin"])
def test_a_sample_that_is_not_there_is_named(
    connection: duckdb.DuckDBPyConnection, function: str, shard: int, sample: int
) -> None:
    with pytest.raises(duckdb.Error, match=f"ValueError: shard {shard} has no sample {sample}; .* lists"):
        connection.sql(f"select {function}({shard}, {sample})").fetchall()


def test_a_corpus_without_origins_has_texts(opened: SampleTexts, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    for path in opened.corpus.folder.iterdir():
        if path.name != "documents.parquet":
            (old / path.name).write_bytes(path.read_bytes())
    texts = SampleTexts(old, 5, None)
    assert not texts.has_origins
    assert texts.origins([0, 1], [0, 1]) == [None, None]
    assert texts.texts([0], [0]) == opened.texts([0], [0])
    with duckdb.connect() as connection:
        connection.execute(f"create view samples as from '{opened.corpus.samples_path}'")
        texts.register(connection)
        query = "select distinct file, document, first_token, num_documents from sample_texts"
        assert connection.sql(query).fetchall() == [(None,) * 4]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1 damaged PAR1"])
def test_a_damaged_file_of_origins_is_named(opened: SampleTexts, tmp_path: Path, content: bytes) -> None:
    for path in opened.corpus.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "documents.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"documents\.parquet: damaged .*restore it"):
        SampleTexts(tmp_path, 5, None).origins([0], [0])
