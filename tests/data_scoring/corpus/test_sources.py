"""Readers of source files: nothing read twice, nothing left out, and whatever is damaged named by its file."""

import bz2
import gzip
import io
import json
import lzma
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_scoring.config import SourceConfig
from data_scoring.corpus import source_files, sources
from data_scoring.corpus.sources import Rejects, find_source, read_documents, resolve_format


def read(path: Path | str, **options: object) -> list[str]:
    """Return the documents of a source, whose records all have to be good."""
    source = SourceConfig.model_validate({"name": "web", "path": str(path), **options})
    return list(read_documents(source, Rejects(Path("/nowhere"), skip=False)))


def read_good(path: Path, rejects: Path, **options: object) -> tuple[list[str], list[tuple[str, int, str]]]:
    """Return the documents of a source and its bad records."""
    source = SourceConfig.model_validate({"name": "web", "path": str(path), **options})
    documents = list(read_documents(source, Rejects(rejects, skip=True)))
    lines = rejects.read_text().splitlines() if rejects.exists() else []
    return documents, [tuple(json.loads(line).values()) for line in lines]


def write_jsonl(path: Path, *texts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def write_parquet(path: Path, *texts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": list(texts)}), path)


def write_text(path: Path, *texts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(texts))


NAMES = ("a", "b[1]", "b1", "c[x]", "d*", "d?", "dd", "[!a]", "e::f", "{a,b}", "source=web", "~", "x y", "é")
WRITERS: dict[str, Callable[..., None]] = {"jsonl": write_jsonl, "parquet": write_parquet, "txt": write_text}


@pytest.mark.parametrize("ending", WRITERS)
def test_names_are_literal(tmp_path: Path, ending: str) -> None:
    for name in NAMES:
        WRITERS[ending](tmp_path / "folder" / f"{name}.{ending}", name)
        WRITERS[ending](tmp_path / "nested" / name / f"file.{ending}", name)
    assert sorted(read(tmp_path / "folder")) == sorted(NAMES)
    assert sorted(read(tmp_path / "folder" / "*")) == sorted(NAMES)
    assert sorted(read(tmp_path / "nested")) == sorted(NAMES)
    for name in NAMES:
        assert read(tmp_path / "folder" / f"{name}.{ending}") == [name]
        assert read(tmp_path / "nested" / name) == [name]
        assert read(tmp_path / "nested" / name / f"file.{ending}") == [name]
    # Brackets of a name that exists are literal in a pattern, too.
    assert read(tmp_path / "nested" / "b[1]" / "f*") == ["b[1]"]
    assert sorted(read(tmp_path / "nested" / "d?" / f"*.{ending}")) == ["d*", "d?", "dd"]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("a", "b", "sub/c", "sub/deep/d", "x.jsonl/part"):
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", name)
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", ["a", "b", "sub/c", "sub/deep/d", "x.jsonl/part"]),
        ("*", ["a", "b", "sub/c", "sub/deep/d", "x.jsonl/part"]),
        ("**", ["a", "b", "sub/c", "sub/deep/d", "x.jsonl/part"]),
        ("**/*.jsonl", ["a", "b", "sub/c", "sub/deep/d", "x.jsonl/part"]),
        ("*.jsonl", ["a", "b", "x.jsonl/part"]),
        ("[ab].jsonl", ["a", "b"]),
        ("[!a].jsonl", ["b", "x.jsonl/part"]),
        ("s*", ["sub/c", "sub/deep/d"]),
        ("*/*.jsonl", ["sub/c", "x.jsonl/part"]),
        ("*/*", ["sub/c", "sub/deep/d", "x.jsonl/part"]),
        ("**/deep", ["sub/deep/d"]),
        ("*/../a.jsonl", ["a"]),
    ],
)
def test_a_folder_that_a_pattern_matches_is_read(tree: Path, pattern: str, expected: list[str]) -> None:
    assert sorted(read(tree / pattern)) == expected


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    for name in ("data/a/own", "disk/b/linked", "disk/c/file", "disk/b/deep/far"):
        write_jsonl(tmp_path / f"{name}.jsonl", name)
    (tmp_path / "data/b").symlink_to(tmp_path / "disk/b")
    (tmp_path / "data/x.jsonl").symlink_to("../disk/c/file.jsonl")
    expected = ["data/a/own", "disk/b/deep/far", "disk/b/linked", "disk/c/file"]
    paths = [tmp_path / "data" / end for end in ("", "*", "**", "**/*.jsonl")]
    for path in paths:
        assert sorted(read(path)) == expected
    # Loops, links to a folder that is read anyway, and links to nothing.
    (tmp_path / "data/loop").symlink_to(".")
    (tmp_path / "data/a/up").symlink_to("..")
    (tmp_path / "disk/b/back").symlink_to(tmp_path / "data")
    (tmp_path / "data/twice").symlink_to(tmp_path / "disk/b")
    (tmp_path / "data/0").symlink_to("a")
    (tmp_path / "data/missing.jsonl").symlink_to("nothing")
    (tmp_path / "data/endless").symlink_to("endless")
    for path in paths:
        assert sorted(read(path)) == expected
    # What is in the tree keeps its own name.
    source = SourceConfig(name="web", path=str(tmp_path / "data"))
    names = [name.removeprefix(f"{tmp_path}/data/") for name in find_source(source).names]
    assert names == ["a/own.jsonl", "b/deep/far.jsonl", "b/linked.jsonl", "x.jsonl"]


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return bytes(sink.getvalue())


CODECS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}
GENERATOR = random.Random(0)
TEXTS = [f"{number} {GENERATOR.random()}" for number in range(2000)]
LINES = [json.dumps({"text": text}).encode() + b"\n" for text in TEXTS]


def parts_of(codec: str, size: int = 300) -> list[bytes]:
    return [CODECS[codec](b"".join(LINES[at : at + size])) for at in range(0, len(LINES), size)]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("ending", [".jsonl", ".JSONL", ".txt"])
def test_all_streams_of_a_compressed_file_are_read(tmp_path: Path, codec: str, ending: str) -> None:
    path = tmp_path / f"a{ending}.{codec}"
    for parts in ([CODECS[codec](b"".join(LINES))], parts_of(codec)):
        path.write_bytes(b"".join(parts))
        options = {"document": "line"} if ending == ".txt" else {}
        assert read(path, **options) == (TEXTS if not options else [line.decode().rstrip("\n") for line in LINES])


def test_frames_to_skip_and_padding_are_no_end(tmp_path: Path) -> None:
    parts = parts_of("zst")
    skipped = struct.pack("<II", 0x184D2A50, 4) + b"size"
    (tmp_path / "a.jsonl.zst").write_bytes(skipped + skipped.join(parts) + skipped)
    (tmp_path / "b.jsonl.xz").write_bytes((b"\0" * 8).join(parts_of("xz")) + b"\0" * 4)
    (tmp_path / "c.jsonl.gz").write_bytes(b"".join(parts_of("gz")) + b"\0" * 512)
    (tmp_path / "without ending").write_bytes(b"".join(parts_of("bz2")))
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        archive.writestr("one.jsonl", b"".join(LINES[:7]))
        archive.writestr("folder/two.jsonl.gz", gzip.compress(b"".join(LINES[7:])))
    for name in ("a.jsonl.zst", "b.jsonl.xz", "c.jsonl.gz", "without ending", "d.zip"):
        assert read(tmp_path / name, format="jsonl") == TEXTS


def damage(codec: str) -> dict[str, bytes]:
    parts = parts_of(codec)
    whole = b"".join(parts)
    second = bytearray(parts[1])
    second[: len(second) // 2] = bytes(len(second) // 2)
    return {
        "cut in the first": parts[0][: len(parts[0]) // 2],
        "cut in the middle": whole[: len(parts[0]) + len(parts[1]) // 2],
        "cut in the trailer": whole[:-2],
        "cut in a header": whole[: len(parts[0]) + 2],
        "a damaged stream": parts[0] + bytes([parts[1][0]]) + bytes(second[1:]) + parts[2],
        "something behind": whole + b"something else",
        "not compressed": b"".join(LINES),
        "an HTML page": b"<html>404</html>",
    }


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("what", damage("gz"))
@pytest.mark.parametrize("skip", [True, False])
def test_a_damaged_compressed_file_is_named(tmp_path: Path, codec: str, what: str, skip: bool) -> None:
    write_jsonl(tmp_path / "data" / "a.jsonl", "good")
    (tmp_path / "data" / f"b.jsonl.{codec}").write_bytes(damage(codec)[what])
    source = SourceConfig(name="web", path=str(tmp_path / "data"))
    message = rf"^corpus.sources.web.path: '.*/b\.jsonl\.{codec}' cannot be read \(.+\); repair or replace the file"
    with pytest.raises(ValueError, match=message) as error:
        list(read_documents(source, Rejects(tmp_path / "rejects.jsonl", skip)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("codec", CODECS)
def test_a_compressed_file_without_its_ending_is_named(tmp_path: Path, codec: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(CODECS[codec](b"".join(LINES)))
    with pytest.raises(ValueError, match=rf"a\.jsonl' cannot be read \(it is compressed; rename it so .* \.{codec}\)"):
        read(tmp_path / "a.jsonl")


TABLES = {
    "more columns": [{"text": ["a"]}, {"text": ["b"], "score": [0.5]}],
    "fewer columns": [{"text": ["a"], "score": [0.5]}, {"text": ["b"]}],
    "other types": [{"text": ["a"], "id": [1]}, {"text": ["b"], "id": ["x"]}],
    "nested": [{"text": ["a"], "meta": [{"text": "no"}]}, {"text": ["b"], "meta": [[1]]}],
    "a nested column of the same name": [{"text": ["a"], "text.x": ["no"]}, {"text.x": ["no"], "text": ["b"]}],
    "nulls": [{"text": ["a"], "url": pa.nulls(1)}, {"text": ["b"], "url": ["x"]}],
    "order": [{"text": ["a"], "n": [1]}, {"n": [1], "text": ["b"]}],
    "large": [{"text": pa.array(["a"], pa.large_string())}, {"text": pa.array(["b"], pa.string_view())}],
    "dictionary": [{"text": pa.array(["a"]).dictionary_encode()}, {"text": ["b"]}],
    "no rows first": [{"text": pa.array([], pa.string())}, {"text": ["a", "b"]}],
    "no columns first": [{}, {"text": ["a", "b"]}],
    "no rows of another type": [{"text": pa.array([], pa.int64())}, {"text": ["a", "b"]}],
    "no rows last": [{"text": ["a", "b"]}, {"text": pa.nulls(0)}],
}


@pytest.mark.parametrize("tables", TABLES)
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_only_the_text_column_of_parquet_files_matters(tmp_path: Path, tables: str, version: str) -> None:
    for number, columns in enumerate(TABLES[tables]):
        pq.write_table(pa.table(columns), tmp_path / f"{number}.parquet", data_page_version=version)
    assert read(tmp_path) == ["a", "b"]


def test_parquet_rows_without_text_are_bad_records(tmp_path: Path) -> None:
    binary = pa.array([b"good", b"caf\xe9", None, b"fine"], pa.binary())
    pq.write_table(pa.table({"text": binary.view(pa.string())}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "b.parquet")
    documents, bad = read_good(tmp_path, tmp_path / "rejects")
    assert documents == ["good", "fine"]
    a, b = str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")
    assert [(file, row) for file, row, _ in bad] == [(a, 2), (a, 3), (b, 1), (b, 2)]
    assert ["not UTF-8" in bad[0][2], "NoneType" in bad[1][2], "is int" in bad[2][2]] == [True] * 3


@pytest.mark.parametrize("columns", [["body"], ["text", "text"]])
def test_a_parquet_file_without_one_text_column_is_named(tmp_path: Path, columns: list[str]) -> None:
    write_parquet(tmp_path / "a.parquet", "good")
    pq.write_table(pa.Table.from_arrays([pa.array(["x"])] * len(columns), columns), tmp_path / "b.parquet")
    with pytest.raises(
        ValueError, match=r"b\.parquet: (no column|2 columns) 'text' among \[.*text_field to the column"
    ):
        read(tmp_path)


@pytest.mark.parametrize("codec", ["none", "snappy", "zstd", "gzip", "lz4", "brotli"])
def test_damaged_parquet_files_are_named_or_read(tmp_path: Path, codec: str) -> None:
    path = tmp_path / "data" / "b.parquet"
    write_parquet(tmp_path / "data" / "a.parquet", "good")
    texts = [f"document {number} has words {number * 7919}" for number in range(2000)]
    pq.write_table(pa.table({"text": texts}), path, compression=codec, row_group_size=700, write_page_checksum=True)
    whole, generator, named = path.read_bytes(), random.Random(1), 0
    for trial in range(60):
        content = bytearray(whole)
        if trial % 3 == 0:
            del content[generator.randrange(len(content)) :]
        else:
            start = generator.randrange(len(content))
            content[start : start + 100] = generator.randbytes(len(content[start : start + 100]))
        path.write_bytes(content)
        try:
            # Pages have checksums: what is read is right.
            assert read(tmp_path / "data") == ["good", *texts]
        except ValueError as error:
            named += 1
            assert "/b.parquet" in str(error)
            assert "\n" not in str(error)
    assert named > 55


@pytest.mark.parametrize(
    "error", [RecursionError("deep"), OSError("Invalid data"), Exception("two\nlines"), KeyError()]
)
@pytest.mark.parametrize("ending", WRITERS)
def test_whatever_reading_raises_names_the_file(
    tmp_path: Path, ending: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise error

        read1 = readinto = readinto1 = read  # type: ignore[assignment]

    for name in "ab":
        WRITERS[ending](tmp_path / f"{name}.{ending}", "text")
    open_file = source_files.open_file
    for module in (source_files, sources):
        monkeypatch.setattr(module, "open_file", lambda name: Failing() if Path(name).stem == "b" else open_file(name))
    with pytest.raises(ValueError, match=rf"^corpus.sources.web.path: '.*/b\.{ending}' cannot be read \(.+\)") as found:
        read(tmp_path)
    assert "\n" not in str(found.value)


def test_a_document_that_is_too_large_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LARGEST_DOCUMENT_BYTES", 1 << 20)
    (tmp_path / "a.txt").write_text("x" * (1 << 20))
    assert read(tmp_path / "a.txt") == ["x" * (1 << 20)]
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"x" * ((1 << 20) + 1)))
    with pytest.raises(ValueError, match=r"a\.txt\.gz: over 1 MB in one document; set corpus.sources.web.document to"):
        read(tmp_path / "a.txt.gz")


@pytest.mark.parametrize("name", ["b[1]", "d*", "d?"])
def test_a_data_set_whose_name_is_a_pattern_is_refused(tmp_path: Path, name: str) -> None:
    for each in (name, "b1", "dd"):
        write_jsonl(tmp_path / each / "data" / "b[1].jsonl", each)
        write_jsonl(tmp_path / each / "data" / "b1.jsonl", f"other {each}")
    assert sorted(read(tmp_path / "b1", format="datasets")) == ["b1", "other b1"]
    with pytest.raises(
        ValueError, match=r"datasets takes the brackets, asterisks or question marks of .* for a pattern"
    ):
        read(tmp_path / name, format="datasets")


def test_urls_are_read_through_fsspec(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for name in ("set/a.jsonl", "set/sub/b[1].jsonl", "set/sub/b1.jsonl"):
        with memory.open(f"/{name}", "w") as file:
            file.write(json.dumps({"text": name}))
    names = ["set/a.jsonl", "set/sub/b1.jsonl", "set/sub/b[1].jsonl"]
    for path in ("memory://set", "memory://set/*", "memory://set/**"):
        assert sorted(read(path)) == names
    assert read("memory://set/sub/b[1].jsonl") == names[2:]
    assert resolve_format(SourceConfig(name="a", path="memory://set/a.jsonl")) == "jsonl"
