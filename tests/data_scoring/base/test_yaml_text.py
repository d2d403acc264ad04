"""Every way in which a YAML file can be wrong is one line that names the file and the line."""

import time
from pathlib import Path

import pytest

from data_scoring.base.yaml_text import parse_yaml, read_yaml


def _levels(first: str, level: str, count: int) -> str:
    lines = [first, *(level.format(this=number, before=number - 1) for number in range(1, count))]
    return "\n".join(lines)


_ALIASES = ", ".join(["*a{before}"] * 9)
BOMB = _levels("a0: &a0 [1, 1]", f"a{{this}}: &a{{this}} [{_ALIASES}]", 10)
MERGES = _levels("a0: &a0 {x: 1}", f"a{{this}}: &a{{this}} {{{{<<: [{_ALIASES}]}}}}", 10)
CHAIN = _levels("a0: &a0 [1]", "a{this}: &a{this} [*a{before}]", 1000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: a is already in line 1; delete one of the two"),
        ("a:\n  b: 1\n  b: 1", "line 3: b is already in line 2; delete one of the two"),
        ("a: " + "[" * 1000, "line 1: more than 64 levels of nesting; write fewer"),
        ("a: " + "{b: " * 1000, "line 1: more than 64 levels of nesting; write fewer"),
        (BOMB, "values, aliases included; write fewer"),
        (MERGES, "values, aliases included; write fewer"),
        (CHAIN, "more than 64 levels, aliases included; write fewer"),
        ("a: &a [*a]", "line 1: an alias stands for what contains it; write the value out"),
        ("a: *b", "line 1, column 4: found undefined alias"),
        ("a: !!python/object:os.x {}", "line 1: the tag 'tag:yaml.org,2002:python/object:os.x' is not supported"),
        ("a: !!binary aGk=", "is not supported; remove it"),
        ("a: !!bool x", "is not supported; remove it"),
        ("a: 9223372036854775808", "line 1: 9223372036854775808 does not fit into 64 bits; correct it"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("\n1: 2", "line 2: the key 1 is not a name; put it in quotes"),
        ("on: 2", "line 1: the key on is not a name; put it in quotes"),
        ("? [a]\n: 2", "line 1: the key of several values is not a name"),
        ('a: "\\0"', "line 1: the control character '\\x00' in a text; remove it"),
        ("a: \0", "control characters are not allowed"),
        ("a: " + "x" * 70_000, "line 1: a text of more than 65,536 characters; shorten it"),
        ("a: 2001-99-99", "month must be in 1..12"),
        ("a: [", "line 2, column 1: did not find expected node content"),
        ("--- a\n--- b", "found another document"),
        ("a: 1\n" * 1_000_000, "larger than 4,194,304 bytes; give a YAML file"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    started = time.process_time()
    with pytest.raises(ValueError) as error:
        read_yaml(path)
    assert time.process_time() - started < 5
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400 + len(str(path))


def test_folders_and_endless_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder; give a YAML file"):
        read_yaml(tmp_path)
    with pytest.raises(ValueError, match="larger than"):
        read_yaml(Path("/dev/zero"))


def test_what_is_valid_is_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: &a {x: [1, 2.5], y: ~}\nb: *a\nc: {<<: *a, y: 3}\nd: !!str 1\n")
    value = read_yaml(path)
    same = {"x": [1, 2.5], "y": None}
    assert value == {"a": same, "b": same, "c": {"x": [1, 2.5], "y": 3}, "d": "1"}
    # A change of one place does not change another.
    value["a"]["x"].append(3)
    assert value["b"] == same
    assert parse_yaml("", "x") is None
