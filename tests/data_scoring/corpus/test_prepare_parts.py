"""A corpus is the same whatever the engine, and whatever the parts that its text is cut into."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_scoring.base.engine import Engine, LocalEngine
from data_scoring.base.progress import silent
from data_scoring.config import CorpusConfig, TokenizerConfig
from data_scoring.corpus import shuffle, source_parts
from data_scoring.corpus.prepare_corpus import prepare_corpus
from tests.conftest import make_documents
from tests.data_scoring.odd_engines import DeadlyEngine

TOKENIZER = TokenizerConfig(vocab_size=300)


def write_text(folder: Path) -> CorpusConfig:
    documents = [*make_documents(400, 1), *make_documents(30, 1), "", *make_documents(200, 2)]
    lines = [json.dumps({"text": document}) for document in documents]
    lines.insert(100, "no JSON")
    lines.insert(500, '{"text": 3}')
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "b.txt").write_text("\n\n".join(make_documents(300, 4)) + "\n\n\xff")
    pq.write_table(pa.table({"text": make_documents(300, 2)}), folder / "c.parquet", row_group_size=50)
    (folder / "d").mkdir()
    for number, document in enumerate(make_documents(40, 5)):
        (folder / "d" / f"{number:02d}.txt").write_text(document)
    sources = [
        {"name": "a", "path": str(folder / "a.jsonl")},
        {"name": "b", "path": str(folder / "b.txt"), "document": "paragraph"},
        {"name": "c", "path": str(folder / "c.parquet")},
        {"name": "d", "path": str(folder / "d")},
        {"name": "e", "path": str(folder / "a.jsonl"), "max_documents": 50},
    ]
    return CorpusConfig.model_validate(
        {"sources": sources, "seq_length": 16, "num_shards": 3, "on_bad_record": "skip", "validation_fraction": 0.1}
    )


@pytest.fixture
def text(tmp_path: Path) -> CorpusConfig:
    return write_text(tmp_path)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut even small files, in this process; those of a pool are given parts that are cut already."""
    monkeypatch.setattr(source_parts, "_SMALLEST_PART_BYTES", 4000)


@pytest.fixture(scope="module")
def pool() -> Iterator[Engine]:
    with LocalEngine(2) as engine:
        yield engine


def prepare(config: CorpusConfig, folder: Path, engine: Engine) -> dict[str, bytes]:
    prepare_corpus(config, TOKENIZER, 5, folder, "f", silent, engine)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.usefixtures("small_parts")
def test_one_process_and_two_make_the_same_corpus(text: CorpusConfig, tmp_path: Path, pool: Engine) -> None:
    one, two = prepare(text, tmp_path / "one", LocalEngine(1)), prepare(text, tmp_path / "two", pool)
    assert one == two


def test_the_cuts_change_nothing_but_the_row_groups_of_documents(
    text: CorpusConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare(text, tmp_path / "whole", LocalEngine(1))
    # Several runs a part, and several windows a shard.
    monkeypatch.setattr(shuffle, "_RUN_TOKENS", 500)
    monkeypatch.setattr(shuffle, "_WINDOW_BYTES", 3000)
    for size in (1500, 4000, 20_000):
        monkeypatch.setattr(source_parts, "_SMALLEST_PART_BYTES", size)
        folder = tmp_path / str(size)
        cut = prepare(text, folder, LocalEngine(1))
        assert cut.keys() == whole.keys()
        assert {name for name in cut if cut[name] != whole[name]} <= {"documents.parquet", "manifest.json"}
        tables = [pq.read_table(each / "documents.parquet") for each in (tmp_path / "whole", folder)]
        assert tables[0].equals(tables[1])
        manifests = [json.loads(each["manifest.json"]) for each in (cut, whole)]
        for manifest in manifests:
            del manifest["record_checksum"], manifest["files"]["documents.parquet"]
        assert manifests[0] == manifests[1]


@pytest.mark.usefixtures("small_parts")
def test_the_first_bad_record_of_all_parts_is_named(tmp_path: Path, pool: Engine) -> None:
    lines = [json.dumps({"text": document}) for document in make_documents(400, 1)]
    lines[170], lines[390] = "bad", "worse"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    config = CorpusConfig.model_validate({"sources": [{"name": "a", "path": str(tmp_path / "a.jsonl")}]})
    for number, engine in enumerate((LocalEngine(1), pool)):
        with pytest.raises(ValueError, match=r"a\.jsonl:171: not valid JSON") as error:
            prepare(config, tmp_path / str(number), engine)
        assert "\n" not in str(error.value)


class DeadlyOnce(DeadlyEngine):
    """Loses a process in the map of one function."""

    def __init__(self, function: str, marker: Path) -> None:
        super().__init__(0, marker)
        self._function = function

    def map(self, work, parts, report, is_long=True):  # type: ignore[no-untyped-def]
        engine = super() if work.func.__name__ == self._function else super(DeadlyEngine, self)
        return engine.map(work, parts, report, is_long)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("function", ["tokenise_part", "assemble_shard"])
def test_a_killed_process_costs_its_parts_alone(function: str, text: CorpusConfig, tmp_path: Path) -> None:
    expected = prepare(text, tmp_path / "unbroken", LocalEngine(1))
    with (
        DeadlyOnce(function, tmp_path / "killed") as engine,
        pytest.raises(ValueError, match=r"engine\.processes: a process of the pool was killed"),
    ):
        prepare_corpus(text, TOKENIZER, 5, tmp_path / "broken", "f", silent, engine)
    assert (tmp_path / "killed").exists()
    assert not (tmp_path / "broken" / "manifest.json").exists()
    assert prepare(text, tmp_path / "broken", LocalEngine(1)) == expected


def test_work_done_twice_changes_nothing(text: CorpusConfig, tmp_path: Path) -> None:
    """As an engine may work on a part again whose worker it has lost."""

    class Twice(LocalEngine):
        def map(self, work, parts, report, is_long=True):  # type: ignore[no-untyped-def]
            for part in parts:
                work(part, report)
                yield work(part, report)

    expected = prepare(text, tmp_path / "once", LocalEngine(1))
    assert prepare(text, tmp_path / "twice", Twice()) == expected
