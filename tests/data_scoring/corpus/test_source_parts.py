"""Parts of sources: whatever the cuts, all documents are read, once, in order, with their numbers and their errors."""

import gzip
import json
import random
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_scoring.config import SourceConfig
from data_scoring.corpus.documents import Document
from data_scoring.corpus.source_parts import Piece, SourcePart, cut_source, part_bytes
from data_scoring.corpus.sources import count_before, find_source, locate_documents, look_at_files, read_pieces
from tests.conftest import make_documents

Bad = list[tuple[str, int, str]]


def read_whole(source: SourceConfig) -> tuple[list[Document], Bad]:
    bad: Bad = []
    return list(locate_documents(source, lambda *where: bad.append(where))), bad


def read_parts(source: SourceConfig, kind: str, parts: list[SourcePart]) -> tuple[list[Document], Bad]:
    """Read the parts, one by one, and add the lines before each."""
    documents, bad, lines = [], [], 0
    for part in parts:
        lines = lines if part.pieces[0].start else 0
        mine: Bad = []
        reader = read_pieces(source, kind, part.pieces, lambda *where: mine.append(where))  # noqa: B023
        while True:
            try:
                document = next(reader)
            except StopIteration as end:
                bad += [(file, lines + line, reason) for file, line, reason in mine]
                lines += end.value
                break
            documents.append(document._replace(number=document.number + lines))
    return documents, bad


def cut(source: SourceConfig, kind: str, size: int) -> list[SourcePart]:
    return cut_source(source, kind, look_at_files(find_source(source)), size)


def jsonl_lines(generator: random.Random) -> list[str]:
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in make_documents(60, generator.randrange(99))]
    for odd in (
        "",
        "   ",
        "no JSON",
        '{"text": 3}',
        '["a", "list"]',
        '\ufeff{"text": "after a mark"}',
        '{"text": "\\r"}',
    ):
        lines.insert(generator.randrange(2, len(lines)), odd)
    return lines


@pytest.mark.parametrize("seed", range(5))
def test_stretches_of_lines_are_the_file(seed: int, tmp_path: Path) -> None:
    generator = random.Random(seed)
    text = "".join(line + generator.choice(["\n", "\n", "\r\n", "\r"]) for line in jsonl_lines(generator))
    head = generator.choice(["", "\n", " \r\n\n", "\ufeff", "\ufeff\n"])
    (tmp_path / "a.jsonl").write_bytes((head + text).encode() + generator.choice([b"", b"\n\n", b'{"text": "last"}']))
    (tmp_path / "a.txt").write_bytes((tmp_path / "a.jsonl").read_bytes() + b"\xff\n" + text.encode())
    for name, kind in (("a.jsonl", "jsonl"), ("a.txt", "text")):
        source = SourceConfig(name="a", path=str(tmp_path / name), document="line")
        expected = read_whole(source)
        assert len(expected[0]) > 50 and expected[1]
        for size in (1, 7, 50, 333, 2000, 10**6):
            parts = cut(source, kind, size)
            is_cut = kind == "text" or head.strip("\ufeff") == ""
            assert len(parts) == (-(-(tmp_path / name).stat().st_size // size) if is_cut else 1)
            assert read_parts(source, kind, parts) == expected


@pytest.mark.parametrize("seed", range(6))
def test_stretches_of_paragraphs_are_the_file(seed: int, tmp_path: Path) -> None:
    generator = random.Random(seed)
    ends = [
        "\n\n",
        "\n\n\n",
        "\n\n\n\n",
        "\r\n\r\n",
        "\n",
        "\r\n",
        "\n \n",
        "\r\r",
        "\n\r\n",
        "\r\n\n",
        "\n\n\n\n\n\n\n",
    ]
    text = "".join(each + generator.choice(ends) for each in make_documents(80, seed))
    text = generator.choice(["", "\n\n\n", "\r\n"]) + text
    (tmp_path / "a.txt").write_bytes(text.encode() + generator.choice([b"", b"\n\n\xff", b"\n\nend"]))
    source = SourceConfig(name="a", path=str(tmp_path / "a.txt"), document="paragraph")
    expected = read_whole(source)
    for size in (1, 3, 40, 333, 10**6):
        assert read_parts(source, "text", cut(source, "text", size)) == expected


def test_stretches_of_row_groups_are_the_file(tmp_path: Path) -> None:
    texts = [*make_documents(500), None, "end"]
    pq.write_table(pa.table({"id": range(502), "text": texts}), tmp_path / "a.parquet", row_group_size=37)
    source = SourceConfig(name="a", path=str(tmp_path / "a.parquet"))
    expected = read_whole(source)
    assert len(expected[0]) == 501 and expected[1][0][1] == 501
    for size in (10, 1000, 5000, 10**6):
        assert read_parts(source, "parquet", cut(source, "parquet", size)) == expected


def test_small_files_are_grouped_and_large_ones_cut(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / f"{number:02d}.jsonl").write_text('{"text": "one"}\n' * (1 if number != 20 else 100))
    source = SourceConfig(name="a", path=str(tmp_path))
    parts = cut(source, "jsonl", 160)
    sizes = [part.num_bytes for part in parts]
    assert sum(sizes) == 16 * 149 and max(sizes) == 160 and len(parts) == 2 + 10 + 3
    assert read_parts(source, "jsonl", parts) == read_whole(source)
    assert [part.number for part in parts] == list(range(15))


def test_what_cannot_be_cut_is_one_part(tmp_path: Path) -> None:
    documents = [{"text": text} for text in make_documents(200)]
    lines = "\n".join(map(json.dumps, documents))
    (tmp_path / "array.json").write_text(json.dumps(documents))
    (tmp_path / "array_of_lines.json").write_text(" \n[\n" + ",\n".join(map(json.dumps, documents)) + "]")
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "noname").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "whole.txt").write_text(lines)
    (tmp_path / "lines.jsonl").write_text(lines)
    limited = SourceConfig(name="a", path=str(tmp_path / "lines.jsonl"), max_documents=150)
    others = [SourceConfig(name="a", path=str(tmp_path / name), format=kind) for name, kind in (
        ("array.json", "jsonl"), ("array_of_lines.json", "jsonl"), ("lines.jsonl.gz", "jsonl"), ("noname", "jsonl"),
        ("whole.txt", "text"),
    )]  # fmt: skip
    for source in (limited, *others):
        [part] = cut(source, source.format.replace("auto", "jsonl"), 100)
        assert [(piece.start, piece.stop) for piece in part.pieces] == [(0, None)]


def test_a_changed_file_changes_its_parts_only(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text('{"text": "one"}\n' * 20)
    source = SourceConfig(name="a", path=str(tmp_path))
    before = [part.identity for part in cut(source, "jsonl", 200)]
    assert before == [part.identity for part in cut(source, "jsonl", 200)] and len({*before}) == 4
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n' * 20)
    after = [part.identity for part in cut(source, "jsonl", 200)]
    assert [mine == theirs for mine, theirs in zip(before, after, strict=True)] == [True, True, False, False]


def test_the_size_of_parts_follows_the_text() -> None:
    assert part_bytes(0) == part_bytes(10**9) == 16 << 20
    assert 10**13 / part_bytes(10**13) < 10_000
    assert part_bytes(10**15) == 1 << 30


@pytest.mark.parametrize("unit", ["line", "paragraph"])
def test_what_is_before_a_stretch_is_counted_in_little_memory(tmp_path: Path, unit: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a line\nand another one\n\n" * 1_600_000)
    size = path.stat().st_size
    tracemalloc.start()
    count = count_before(Piece(str(path), size // 2 + 1, None), unit)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == (800_001 if unit == "paragraph" else 2_400_001)
    assert peak < size / 3
