"""Records of JSON files: lines and elements of arrays, compared with the library that reads the whole file."""

import json
import random
from pathlib import Path

import pytest

from data_scoring.corpus import json_records
from tests.data_scoring.corpus.test_sources import read, read_good


def element(generator: random.Random, depth: int = 0) -> object:
    choice = generator.randrange(8 if depth < 4 else 5)
    if choice == 5:
        return [element(generator, depth + 1) for _ in range(generator.randrange(4))]
    if choice > 5:
        return {text_of(generator): element(generator, depth + 1) for _ in range(generator.randrange(4))}
    return [text_of(generator), 1.5e-7, None, True, -3][choice]


def text_of(generator: random.Random) -> str:
    return "".join(generator.choices('ab"\\[]{},:\n\r\t é\u2028\U0001f600', k=generator.randrange(12)))


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize("indent", [None, 0, 2])
def test_a_json_array_is_read(tmp_path: Path, chunk: int, indent: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_records, "_CHUNK", chunk)
    monkeypatch.setattr(json_records, "_FIRST_LINE", max(chunk, 5))
    generator = random.Random(chunk)
    for number in range(20):
        rows = [
            {"meta": element(generator), "text": f"text {text_of(generator)}", "more": element(generator)}
            for _ in range(generator.randrange(6))
        ]
        content = json.dumps(rows, indent=indent, ensure_ascii=bool(number % 2))
        start = ["", "\ufeff", "\n \r\n"][number % 3]
        (tmp_path / "a.json").write_text(f"{start}{content}\n", encoding="utf-8", newline="\r\n" if number % 5 else "")
        assert read(tmp_path / "a.json") == [row["text"] for row in rows]


def test_bad_elements_of_an_array_are_skipped(tmp_path: Path) -> None:
    elements = [
        '{"text": "one"}', "7", '"text"', '{"title": "x"}', '{"text": nothing}', "[" * 5000 + "]" * 5000,
        '{"text": "two",\n "more": [1]}', '{"text": 1}',
    ]  # fmt: skip
    path = tmp_path / "a.json"
    path.write_text("[\n" + ",\n".join(elements) + "\n]")
    documents, bad = read_good(path, tmp_path / "rejects")
    assert documents == ["one", "two"]
    assert [line for _, line, _ in bad] == [3, 4, 5, 6, 7, 10]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"}, {"text": "b"}', "the JSON array that it holds is cut short"),
        ('[{"text": "a"}, {"te', "the JSON array that it holds is cut short"),
        ('[\n{"text": "a"},\n{"text": "b', "the JSON array that it holds is cut short"),
        ('[\n{"text": "a"}\n]\n{"text": "b"}\n', "text follows the JSON array that it holds, on line 3"),
        ('[\n{"text": "a"}}\n]', "the JSON array that it holds ends with a wrong bracket on line 1"),
    ],
)
def test_a_damaged_array_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=rf"^corpus.sources.web.path: '.*/a\.json' cannot be read \({message}"):
        read_good(tmp_path / "a.json", tmp_path / "rejects")


@pytest.mark.parametrize(
    ("content", "number", "reason"),
    [
        (b'{"text": "deep", "meta": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 2, "nested too deeply"),
        (b"[" * 1200 + b"]" * 1200, 2, "nested too deeply"),
        (b'{"a":' * 1200 + b"1" + b"}" * 1200, 2, "nested too deeply"),
        (b'{"text": "digits", "n": ' + b"1" * 5000 + b"}", 2, "a number of over 4300 digits"),
        (b'[{"text": "a"}, {"text": "b"}]', 2, "a JSON array, where one object a line is wanted"),
        (b'{"data": [{"text": "a"}]}', 2, "no field 'text'; .* in one object a line"),
        (b"[INFO] started", 2, "not valid JSON as one object a line"),
        (b"{", 2, "not valid JSON as one object a line"),
        (b"\xff", 2, "not UTF-8"),
    ],
)
@pytest.mark.parametrize("is_first", [True, False])
def test_a_bad_line_is_skipped(tmp_path: Path, content: bytes, number: int, reason: str, is_first: bool) -> None:
    lines = [b'{"text": "one"}', b'{"text": "two"}', b"", b'{"text": "three"}']
    lines.insert(0 if is_first else 1, content)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    documents, [(file, line, why)] = read_good(path, tmp_path / "rejects")
    assert documents == ["one", "two", "three"]
    assert (file, line) == (str(path), 1 if is_first else number)
    assert reason.partition("; .*")[0] in why
    with pytest.raises(ValueError, match=rf"a\.jsonl:{line}: .*{reason}.*, or set corpus.on_bad_record: skip"):
        read(path)


def test_odd_lines_are_read_as_they_are(tmp_path: Path) -> None:
    texts = ["a\u2028b\u2029c\u0085d", "\x0b\x0c\x1c", "", "<|endoftext|>", "\U0001f600", "x" * 3_000_000]
    lines = [json.dumps({"text": text}, ensure_ascii=number % 2 == 0) for number, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_bytes("\r\n".join(["", *lines[:3], "  ", *lines[3:]]).encode())
    assert read(tmp_path / "a.jsonl") == texts
