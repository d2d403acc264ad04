"""docs/configuration.md: a table of every field of the configuration.

`python -m flows.run.config_docs` writes it.
"""

import json
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from data_scoring.base.names import OneOf
from flows.run.config import RunConfig

PATH = Path("docs/configuration.md")
_HEAD = """# Configuration

Every field of a run's YAML file. Paths are relative to the folder that the command is typed in. An unknown
field is an error. A field can be overridden on the command line: `--set refine.sampling_rate=0.3`.

A file has to name its run (`name`) and its sources (`corpus`); their defaults are for trying the deployment out.
A run that goes on may change `device`, `parallel`, `launch`, `checkpoint`, `rounds`, `score.micro_batch_size`,
`score.loss_kernel`, `train.micro_batch_size`, `train.loss_kernel`, `train.activation_kernel` and
`train.validate_every_steps`, and a preset's name where its fields are the same; any other change needs another `name`.

| Field | Type and bounds | Default | Meaning |
|---|---|---|---|
"""
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def page() -> str:
    """Return the page, in Markdown."""
    return _HEAD + "".join(f"{row}\n" for row in _rows(RunConfig, ""))


def _rows(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for key, field in model.model_fields.items():
        name = field.alias or key
        inner, suffix = _inner(field.annotation)
        if inner is not None:
            yield from _rows(inner, f"{prefix}{name}{suffix}.")
            continue
        bounds = [
            f"{sign} {getattr(entry, bound)}"
            for entry in field.metadata
            for bound, sign in _BOUNDS.items()
            if getattr(entry, bound, None) is not None
        ]
        kind = ", ".join([_kind(field.annotation, field.metadata), *bounds])
        meaning = (field.description or "").replace("|", "\\|")
        yield f"| `{prefix}{name}` | {kind} | {_default(field)} | {meaning} |"
        for form in map(_plain, get_args(field.annotation)):
            if isinstance(form, type) and issubclass(form, BaseModel):
                yield from _rows(form, f"{prefix}{name}.")


def _inner(annotation: Any) -> tuple[type[BaseModel] | None, str]:
    """Return the section that a field holds, and what its name ends with where it holds several."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, ""
    if get_origin(annotation) is tuple:
        return _inner(get_args(annotation)[0])[0], "[]"
    return None, ""


def _plain(annotation: Any) -> Any:
    """Return an annotation without what is annotated to it."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _kind(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    for entry in metadata:
        if isinstance(entry, OneOf):
            return "one of " + ", ".join(entry.names())
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is Annotated:
        return _kind(arguments[0], arguments[1:])
    if origin is tuple:
        return f"list of {_kind(arguments[0])}"
    if origin in (Union, types.UnionType):
        return " or ".join("null" if part is type(None) else _kind(part) for part in arguments)
    return str(annotation.__name__)


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if field.default == ():
        return "none"
    return field.default if isinstance(field.default, str) else json.dumps(field.default)


if __name__ == "__main__":
    PATH.write_text(page(), encoding="utf-8")
