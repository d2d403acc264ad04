"""Configurations with mistakes: values, structure, YAML and bytes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from hypothesis import strategies as st
from pydantic import BaseModel

from data_scoring.base.field_effects import section_of
from flows.run.config import RunConfig

_SMALL: dict[str, Any] = {"name": "x", "corpus": {"sources": [{"name": "a", "path": "a.jsonl"}]}}
BASES = [_SMALL, *(yaml.safe_load(path.read_text()) for path in sorted(Path("configs").glob("*.yaml")))]

# YAML, as a person would write it.
_ODD_NUMBERS = (
    "0", "-1", "1", "2", "3", "7", "8", "64", "100", "-0.0", "0.5", "1.5", "1e6", "1e-3", "1.0e+6", "1e400", "2e3",
    "1e18", "1.0e+400", ".inf", "-.inf", ".nan", "9223372036854775807", "9223372036854775808", "-9223372036854775809",
    "18446744073709551616", "4611686018427387904", "1000000000", "1" + "0" * 400, "9" * 5000, "0x7f", "0b_",
    "007", "1_000", "190:20:30", "5e-324", "1.7976931348623157e+308", "1e999999999",
)  # fmt: skip
_ODD_VALUES = (
    "", "~", "null", "true", "no", "''", "[]", "{}", "[[]]", "[1, 2]", "{a: b}", "[~]", "2001-01-01", "2001-99-99", "=",
    "<<", "'\\0'", '"\\0"', '"\\ud800"', '"\\U0001F600"', '"a\\nb"', "!!python/object/apply:os.getcwd []", "!!int x",
    "!!binary aGk=", "!!set {a}", "!x y", "&a [*a]", "*nowhere", "x" * 100, "x" * 70_000, "é", "../up", "~/x",
    "/dev/zero", "auto", "off", "full", "prefix:16", "prefix:" + "9" * 5000, "seen", "cpu", "loss", "llama-30m",
    "[hellaswag]", "host:99999", "host:29400", "sql", "1:00:00", "{rule: scaled}", "{rule: scaled, base_lr: .inf}",
    "{from: a}", "[{name: a}]", "@", "%", "- -", "random()", "rowid", "loss + 1", "(select 1)",
)  # fmt: skip
ODD = st.one_of(
    st.sampled_from(_ODD_NUMBERS),
    st.sampled_from(_ODD_VALUES),
    st.integers().map(str),
    st.floats().map(repr),
    st.text(max_size=12),
)


def _leaves(model: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Yield each field and section with values that it accepts, if other fields suit."""
    for key, field in model.model_fields.items():
        name = (*prefix, field.alias or key)
        inner = section_of(field.annotation)
        bounds = [value for entry in field.metadata for kind in ("ge", "le") if (value := getattr(entry, kind, None))]
        names = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        default = [] if field.is_required() or inner is not None else [field.default]
        yield name, [_flow(value) for value in (*bounds, *names, *default)]
        if inner is not None:
            yield from _leaves(inner, name)


def _flow(value: Any) -> str:
    return json.dumps(value)


# Every field and section; fields of lists' entries are reached through the list alone.
_ACCEPTED = dict(_leaves(RunConfig))
FIELDS = sorted(_ACCEPTED)
_NAMES = st.one_of(
    st.sampled_from(FIELDS),
    st.lists(st.sampled_from(["model", "lr", "", "0", "<rule>", "<x>", "a" * 300, "é"]), max_size=4).map(tuple),
)
OVERRIDES = st.lists(st.tuples(_NAMES, ODD).map(lambda pair: f"{'.'.join(pair[0])}={pair[1]}"), max_size=1)


@st.composite
def _texts(draw: st.DrawFn) -> str:
    """YAML of a valid configuration in which some fields have odd values."""
    values: dict[str, Any] = json.loads(json.dumps(draw(st.sampled_from(BASES))))
    odd: dict[str, str] = {}
    for number in range(draw(st.integers(0, 3))):
        *sections, name = draw(st.sampled_from(FIELDS))
        place: Any = values
        for section in sections:
            place = place.setdefault(section, {}) if isinstance(place, dict) else {}
        if isinstance(place, dict):
            place[name] = f"@odd{number}@"
            accepted = _ACCEPTED[*sections, name]
            is_odd = not accepted or draw(st.booleans())
            odd[f'"@odd{number}@"'] = draw(ODD if is_odd else st.sampled_from(accepted))
    text = "\n".join(f"{key}: {_flow(entry)}" for key, entry in values.items()) + "\n"
    for mark, value in odd.items():
        text = text.replace(mark, value)
    return text


def _bomb(levels: int, width: int, merges: bool) -> str:
    lines = ["a0: &a0 {x: 1}" if merges else "a0: &a0 [1]"]
    for level in range(1, levels):
        aliases = ", ".join([f"*a{level - 1}"] * width)
        lines.append(f"a{level}: &a{level} " + (f"{{<<: [{aliases}]}}" if merges else f"[{aliases}]"))
    return "\n".join(lines) + "\n"


_ADDITIONS = st.one_of(
    st.builds(_bomb, st.sampled_from([2, 9, 100, 300]), st.sampled_from([1, 9]), st.booleans()),
    st.sampled_from([1, 30, 63, 64, 65, 1000]).map(lambda depth: "seed: " + "[" * depth + "]" * depth + "\n"),
    st.sampled_from([1, 30, 63, 64, 65, 1000]).map(lambda depth: "seed: " + "{a: " * depth + "}" * depth + "\n"),
    st.sampled_from([1, 30, 63, 64, 65, 1000]).map(
        lambda depth: "".join(" " * level + "a:\n" for level in range(min(depth, 500)))
    ),
    st.tuples(st.text(max_size=8), ODD).map(lambda pair: f"{pair[0]}: {pair[1]}\n"),
    st.sampled_from(
        ["name: y\n", "? [a]\n: 1\n", "1: 2\n", "on: 1\n", "--- b\n", "...\n", "%YAML 9.9\n", "\t\n", "]\n"]
    ),
)


_ODD_BYTES = (b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\n", b"\xed\xa0\x80", b"[" * 200)


def mutated(draw: st.DrawFn, content: bytes) -> bytes:
    """Return `content` with some bytes changed, cut, repeated or put in."""
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(content)))
        end = min(len(content), place + draw(st.sampled_from([0, 1, 2, 8, 100])))
        new = draw(
            st.one_of(
                st.binary(max_size=4),
                st.sampled_from([b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\n", b"\xed\xa0\x80", b"[" * 200]),
            )
        )
        content = content[:place] + draw(st.sampled_from([new, b"", content[place:end] * 2])) + content[end:]
    return content[: draw(st.integers(0, len(content)))] if draw(st.integers(0, 9)) == 0 else content


@st.composite
def configurations(draw: st.DrawFn) -> tuple[bytes, list[str]]:
    """The content of a configuration file, and overrides."""
    text = draw(_texts())
    mistake = draw(st.sampled_from(["none", "none", "yaml", "bytes", "override"]))
    if mistake == "yaml":
        addition = draw(_ADDITIONS)
        text = draw(st.sampled_from([text + addition, addition + text]))
    content = text.encode("utf-8", "surrogatepass")
    if mistake == "bytes":
        content = mutated(draw, content)
    return content, draw(OVERRIDES) if mistake == "override" else []
