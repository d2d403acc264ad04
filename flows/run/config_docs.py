"""docs/configuration.md: a table of every field of the configuration.

`python -m flows.run.config_docs` writes it.
"""

import json
import textwrap
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from data_scoring.base.field_effects import Decides, find_mark, section_of
from data_scoring.base.names import OneOf
from data_scoring.evaluation.tasks import TaskEntry, task_names
from flows.run.config import RunConfig

PATH = Path("docs/configuration.md")
_HEAD = """# Configuration

Every field of a run's YAML file. Paths are relative to the working directory. Unknown fields are errors. Fields can be
overridden on the command line: `--set refine.sampling_rate=0.3`, or `--set corpus.sources.0.path=FILE` for an entry of
a list, counted from 0.

A file has to set `name` and `corpus`; their defaults are only for trying out the deployment.

"""
_TABLE = """| Field | Type and bounds | Default | May change | Meaning |
|---|---|---|---|---|
"""
_OTHER_CHANGES = (
    "Any other change is possible until a stage that it concerns begins; after that, it needs another `name`, or "
    "`reprise fork`"
)
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def page() -> str:
    """Return the page, in Markdown."""
    return _HEAD + _changes() + _TABLE + "".join(f"{row}\n" for row in _rows(RunConfig, ""))


def field_names() -> list[str]:
    """Return the names of all fields, such as refine.sampling_rate; a list is one field."""
    return list(_leaves(RunConfig, ""))


def _changes() -> str:
    """Return the paragraph about the fields that may change when a run is resumed."""
    free = {unless: [f"`{name}`" for name in names] for unless, names in _free_fields().items()}
    always = free.pop("")
    text = (
        f"When a run is resumed, {', '.join(always[:-1])} and {always[-1]} may change, which do not affect any round's "
        "results"
    )
    text += "".join(f", and {' and '.join(names)} unless {unless}" for unless, names in free.items())
    return f"{textwrap.fill(f'{text}. {_OTHER_CHANGES}.', 120, break_on_hyphens=False)}\n\n"


def _free_fields() -> dict[str, list[str]]:
    """Return the names of the fields and whole sections that may change, by their condition."""
    names: dict[str, list[str]] = {}
    for name in _leaves(RunConfig, ""):
        found = find_mark(RunConfig, name)
        if found is not None and not found[1].stages and found[0] not in names.setdefault(_unless(found), []):
            names[_unless(found)].append(found[0])
    return names


def _leaves(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for key, field in model.model_fields.items():
        name = f"{prefix}{field.alias or key}"
        inner = section_of(field.annotation)
        yield from [name] if inner is None else _leaves(inner, f"{name}.")


def _unless(found: tuple[str, Decides]) -> str:
    """Return the condition under which a free field affects results, in words; empty if there is none."""
    path, mark = found
    return f"`{path}.{mark.unless[0]}` is {mark.unless[1]}" if mark.unless else ""


def _may_change(name: str) -> str:
    found = find_mark(RunConfig, name)
    if found is None or found[1].stages:
        return "no"
    return f"yes, unless {unless}" if (unless := _unless(found)) else "yes"


def _rows(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for key, field in model.model_fields.items():
        name = field.alias or key
        inner, suffix = _inner(field.annotation)
        if inner is not None:
            yield from _rows(inner, f"{prefix}{name}{suffix}.")
            continue
        kind = ", ".join([_kind(field.annotation, field.metadata), *_bounds(field.metadata)])
        meaning = (field.description or "").replace("|", "\\|")
        may_change = _may_change(f"{prefix}{name}".replace("[]", ""))
        yield f"| `{prefix}{name}` | {kind} | {_default(field)} | {may_change} | {meaning} |"
        for form in map(_plain, get_args(field.annotation)):
            if isinstance(form, type) and issubclass(form, BaseModel):
                yield from _rows(form, f"{prefix}{name}.")


def _inner(annotation: Any) -> tuple[type[BaseModel] | None, str]:
    """Return the section that a field holds, and the suffix of its name if it holds several."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, ""
    if get_origin(annotation) is tuple:
        return _inner(get_args(annotation)[0])[0], "[]"
    return None, ""


def _bounds(metadata: Sequence[Any]) -> list[str]:
    return [
        f"{sign} {getattr(entry, bound)}"
        for entry in metadata
        for bound, sign in _BOUNDS.items()
        if getattr(entry, bound, None) is not None
    ]


def _plain(annotation: Any) -> Any:
    """Return an annotation without its metadata."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _kind(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    for entry in metadata:
        if isinstance(entry, OneOf | TaskEntry):
            names = ", ".join(entry.names() if isinstance(entry, OneOf) else task_names())
            return f"one of {names}" + (", a task of lm-eval's, or a path" if isinstance(entry, TaskEntry) else "")
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is Annotated:
        inner = [part for entry in arguments[1:] for part in getattr(entry, "metadata", ())]
        return ", ".join([_kind(arguments[0], arguments[1:]), *_bounds(inner)])
    if origin in (tuple, dict):
        return f"list of {_kind(arguments[0])}" if origin is tuple else f"mapping of {_kind(arguments[1])}"
    if origin in (Union, types.UnionType):
        return " or ".join("null" if part is type(None) else _kind(part) for part in arguments)
    return str(annotation.__name__)


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if field.default in ((), {}):
        return "none"
    if isinstance(field.default, BaseModel):
        return "the fields below"
    return field.default if isinstance(field.default, str) else json.dumps(field.default)


if __name__ == "__main__":
    PATH.write_text(page(), encoding="utf-8")
