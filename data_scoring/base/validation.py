"""Validation of what was read from a file, with errors of one line that name file, field, value and remedy."""

import difflib
from collections.abc import Hashable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel, TypeAdapter, ValidationError

from data_scoring.base.field_effects import section_of
from data_scoring.base.files import read_json
from data_scoring.base.messages import one_line, shown

T = TypeVar("T")

# Mistakes of one file in an error message, and characters of the explanation of one.
_MOST_MISTAKES, _MOST_CHARACTERS = 4, 600
REPEAT = "delete it and run the same command again"


def validated(
    model: type[T], values: Any, origin: object, remedy: str = "correct it", context: dict[str, Any] | None = None
) -> T:
    """Return the `model` that `values` describe. Raises ValueError, starting with `origin`, if they are invalid.

    context: what validators of fields get.
    """
    try:
        return cast(T, _adapter(cast(Hashable, model)).validate_python(values, context=context))
    except ValidationError as error:
        raise ValueError(f"{origin}: {explained(error, model, remedy)}") from None


def read_record(path: Path, kind: type[T], remedy: str = REPEAT) -> T | None:
    """Return the JSON record in `path`, as written, or None if the file does not exist.

    kind: a TypedDict; the record may have other fields too. Raises ValueError, naming the file, the field and the
    remedy, if the record does not have these fields with values of these types.
    """
    content = read_json(path, remedy)
    return None if content is None else checked_record(content, kind, path, remedy)


def required_record(path: Path, kind: type[T], remedy: str = REPEAT) -> T:
    """Return the JSON record in `path`. Raises ValueError as `read_record`, and if the file does not exist."""
    record = read_record(path, kind, remedy)
    if record is None:
        raise ValueError(f"{path}: no such file; run the same command again")
    return record


def checked_record(content: Any, kind: type[T], origin: object, remedy: str = REPEAT) -> T:
    """Return `content`, the content of a record. Raises ValueError as `read_record`, starting with `origin`."""
    try:
        _adapter(cast(Hashable, kind)).validate_python(content, strict=True)
    except ValidationError as error:
        raise ValueError(f"{origin}: {explained(error, kind, remedy)}") from None
    return cast(T, content)


def explained(error: ValidationError, model: Any, remedy: str = "correct it") -> str:
    """Return, in one line, the first mistakes that validation for `model` found, each with field, value and remedy."""
    details = error.errors()
    # Invalid entries also make a list count as too short; only the entries' own errors are shown.
    parents = {detail["loc"][:length] for detail in details for length in range(len(detail["loc"]))}
    wrong = [detail for detail in details if detail["loc"] not in parents]
    mistakes = "; also ".join(_explain(detail, model, remedy) for detail in wrong[:_MOST_MISTAKES])
    return mistakes + (f"; and {len(wrong) - _MOST_MISTAKES} more" if len(wrong) > _MOST_MISTAKES else "")


def _explain(detail: Any, model: Any, remedy: str) -> str:
    is_unknown = detail["type"] == "extra_forbidden"
    names = detail["loc"][:-1] if is_unknown else detail["loc"]
    # Parts in angle brackets distinguish the forms of a field, and are not part of its name.
    location = [one_line(name) for name in names if not str(name).startswith("<")]
    field = ".".join(location)
    if is_unknown:
        name = one_line(detail["loc"][-1])
        known = _fields_of(model, location)
        close = difflib.get_close_matches(name, known, n=1)
        suggestion = f"did you mean {close[0]}?" if close else f"known fields: {', '.join(known)}"
        return f"{'.'.join([*location, name])}: unknown field; {suggestion}"
    if detail["type"] == "value_error":
        return (f"{field}." if field else "") + one_line(detail["ctx"]["error"], _MOST_CHARACTERS)
    value = "" if detail["type"] == "missing" else f" (it is {shown(detail['input'])})"
    # Users write lists, in YAML and JSON.
    said = "input should be a list" if detail["type"] == "tuple_type" else detail["msg"]
    message = one_line(said, _MOST_CHARACTERS)
    return f"{f'{field}: ' if field else ''}{message[0].lower()}{message[1:]}{value}; {remedy}"


def _fields_of(model: Any, location: list[str]) -> list[str]:
    section: type[BaseModel] | None = section_of(model)
    for part in location:
        if section is None:
            break
        found = [field for name, field in section.model_fields.items() if part in (name, field.alias)]
        # Other parts are places in a list.
        section = section_of(found[0].annotation) if found else section
    return [] if section is None else [field.alias or name for name, field in section.model_fields.items()]


@cache
def _adapter(kind: Hashable) -> TypeAdapter[Any]:
    return TypeAdapter(cast(Any, kind))
