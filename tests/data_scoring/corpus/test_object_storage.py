"""Sources in object storage, read in parts from a real S3 server on the loopback interface."""

import gzip
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_scoring.base.engine import LocalEngine
from data_scoring.base.progress import silent
from data_scoring.config import CorpusConfig, SourceConfig, TokenizerConfig
from data_scoring.corpus import source_parts
from data_scoring.corpus.prepare_corpus import prepare_corpus
from data_scoring.corpus.sources import check_unchanged, cut_sources, find_source, look_at_files
from tests.conftest import make_documents

fsspec = pytest.importorskip("fsspec")
pytest.importorskip("s3fs")
moto_server = pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URL of an empty bucket."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        # Processes of a pool inherit the environment.
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.filesystem("s3").mkdir("texts")
        yield "s3://texts"
    server.stop()


def write_files(folder: Path) -> None:
    (folder / "lines").mkdir()
    lines = [json.dumps({"text": document}) for document in make_documents(400, 1)]
    (folder / "lines" / "a.jsonl").write_text("\n".join(lines))
    (folder / "lines" / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[:50]).encode()))
    pq.write_table(pa.table({"text": make_documents(300, 2)}), folder / "table.parquet", row_group_size=50)
    (folder / "text.txt").write_text("\n\n".join(make_documents(300, 4)))


def config_of(place: str) -> CorpusConfig:
    sources = [
        {"name": "lines", "path": f"{place}/lines/*"},
        {"name": "table", "path": f"{place}/table.parquet"},
        {"name": "text", "path": f"{place}/text.txt", "document": "paragraph"},
    ]
    return CorpusConfig.model_validate({"sources": sources, "seq_length": 16, "num_shards": 2})


def prepare(config: CorpusConfig, folder: Path, processes: int) -> dict[str, bytes]:
    with LocalEngine(processes) as engine:
        prepare_corpus(config, TokenizerConfig(vocab_size=300), 5, folder, "f", silent, engine)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_text_in_object_storage_is_read_in_parts_like_that_on_disk(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_parts, "_SMALLEST_PART_BYTES", 5000)
    (tmp_path / "texts").mkdir()
    write_files(tmp_path / "texts")
    fsspec.filesystem("s3").put(str(tmp_path / "texts"), f"{bucket}/all", recursive=True)
    remote = config_of(f"{bucket}/all")
    [lines, table, text] = cut_sources([find_source(source) for source in remote.sources])
    assert min(len(lines), len(table), len(text)) > 3
    one, two = prepare(remote, tmp_path / "one", 1), prepare(remote, tmp_path / "two", 2)
    assert one == two
    local = prepare(config_of(str(tmp_path / "texts")), tmp_path / "local", 1)
    # The files have other names, and are told apart by stamps of another kind.
    assert {name for name in one if one[name] != local[name]} == {"documents.parquet", "manifest.json"}
    documents = pq.read_table(tmp_path / "one" / "documents.parquet")
    local_documents = pq.read_table(tmp_path / "local" / "documents.parquet")
    assert documents.drop_columns("file").equals(local_documents.drop_columns("file"))
    assert {name.removeprefix("s3://texts/all") for name in documents["file"].to_pylist()} == {
        name.removeprefix(str(tmp_path / "texts")) for name in local_documents["file"].to_pylist()
    }


def write_text(url: str, text: str) -> None:
    """Write a file as another process does: what this one has listed does not learn of it."""
    from_outside = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
    from_outside.pipe(url, json.dumps({"text": text}).encode())


def test_a_file_that_is_written_again_is_another_one(bucket: str) -> None:
    source, stamps = SourceConfig(name="a", path=f"{bucket}/again/*"), set()
    for text in ("one", "two", "one"):
        write_text(f"{bucket}/again/a.jsonl", text)
        stamps.add(look_at_files(find_source(source))[0].stamp)
    assert len(stamps) == 2


def test_a_file_that_is_added_is_found(bucket: str) -> None:
    source = SourceConfig(name="a", path=f"{bucket}/added/*")
    for count, name in enumerate(("a", "b"), start=1):
        write_text(f"{bucket}/added/{name}.jsonl", name)
        assert len(find_source(source).names) == count


def test_a_file_that_changes_while_it_is_read_is_an_error(bucket: str) -> None:
    write_text(f"{bucket}/changing/a.jsonl", "one")
    [[part]] = cut_sources([find_source(SourceConfig(name="a", path=f"{bucket}/changing"))])
    check_unchanged(part)
    write_text(f"{bucket}/changing/a.jsonl", "two")
    with pytest.raises(ValueError, match=r"'s3://texts/changing/a.jsonl' changed while it was read; run the same"):
        check_unchanged(part)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", b'{"text": "one"}\nbad\n', r"s3://texts/bad.jsonl:2: not valid JSON"),
        (
            "short.jsonl.gz",
            gzip.compress(b'{"text": "one"}\n' * 999)[:-9],
            r"'s3://texts/short.jsonl.gz' cannot be read",
        ),
        ("none.jsonl", None, r"corpus.sources.a.path: no file matches 's3://texts/none.jsonl'"),
    ],
)
def test_errors_name_the_file(bucket: str, tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        fsspec.filesystem("s3").pipe(f"{bucket}/{name}", content)
    config = CorpusConfig.model_validate({"sources": [{"name": "a", "path": f"{bucket}/{name}"}]})
    with pytest.raises(ValueError, match=message) as error:
        prepare(config, tmp_path / "corpus", 1)
    assert "\n" not in str(error.value)


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    config = CorpusConfig.model_validate({"sources": [{"name": "a", "path": "gs://texts/a.jsonl"}]})
    with pytest.raises(ValueError, match=r"corpus\.sources\.a\.path: 'gs://texts/a\.jsonl' cannot be read \(.*gcsfs"):
        prepare(config, tmp_path / "corpus", 1)
