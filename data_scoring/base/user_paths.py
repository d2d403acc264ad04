"""Paths as users write them in configurations: `~` is a home folder, and relative paths count from one folder."""

import glob
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, GetCoreSchemaHandler, ValidationInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

# The key of the validation context that holds the folder from which relative paths count.
BASE = "base"


class LocatedPath(str):
    """A path that can be opened. `typed` is what the user wrote, which is what is stored and fingerprinted."""

    typed: str

    def __new__(cls, path: str, typed: str) -> "LocatedPath":
        """Return `path`, which the user wrote as `typed`."""
        made = super().__new__(cls, path)
        made.typed = typed
        return made

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]
        """Return what copies are made of."""
        return str(self), self.typed


@dataclass(frozen=True)
class UserPath:
    """The mark of a `str` field that holds a path: its value is a `LocatedPath`, and dumps hold what the user wrote.

    is_name: whether a value is no path but a name, by the fields before it and the path that it would be.
    """

    is_name: Callable[[Mapping[str, Any], Path], bool] = lambda fields, path: False

    def _validate(self, value: Any, handler: Callable[[Any], str | None], info: ValidationInfo) -> str | None:
        if isinstance(value, LocatedPath):
            return value
        text = handler(value)
        if text is None:
            return None
        stored_base = (info.context or {}).get(BASE)
        path = locate(text, stored_base or Path.cwd())
        if path is None:
            # The user of a stored configuration may be known elsewhere only.
            if stored_base is None:
                raise PydanticCustomError("user_path", "No such user; write ./~ for a file whose name begins with ~")
            path = text
        return text if self.is_name(info.data, Path(path)) else LocatedPath(path, text)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return the schema of a path."""
        return core_schema.with_info_wrap_validator_function(
            self._validate,
            handler(source),
            serialization=core_schema.plain_serializer_function_ser_schema(
                typed, return_schema=core_schema.nullable_schema(core_schema.str_schema())
            ),
        )


USER_PATH = UserPath()


def typed(path: str | None) -> str | None:
    """Return a path as the user wrote it."""
    return path.typed if isinstance(path, LocatedPath) else path


def locate(text: str, base: Path) -> str | None:
    """Return a path that can be opened from here, for one that counts from `base`; None for an unknown user's home.

    Addresses with a protocol stay as they are. In a pattern, only what the user wrote is one.
    """
    if "://" in text or "::" in text:
        return text
    folder, rest = base, text
    if text.startswith("~") and not os.path.lexists(base / text):
        head, _, rest = text.partition("/")
        home = os.path.expanduser(head)  # noqa: PTH111 - pathlib raises for unknown users
        if home == head:
            return None
        folder = Path(home)
    elif Path(text).is_absolute() or (base == Path.cwd() and not text.startswith("~")):
        return text
    path = str(folder / rest)
    if glob.has_magic(rest) and not os.path.lexists(path):
        return str(Path(glob.escape(str(folder))) / rest)
    return path


def expand_home(text: str) -> Path:
    """Return the path that a user gave on the command line. Raises ValueError for an unknown user's home."""
    path = locate(text, Path.cwd())
    if path is None:
        raise ValueError(f"{text}: no such user; write ./~ for a file whose name begins with ~")
    return Path(path)


def user_paths(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, LocatedPath | str]]:
    """Yield the name and the value of each field of `section` that holds a path, those in its sections included."""
    for name, field in type(section).model_fields.items():
        value, place = getattr(section, name), f"{prefix}{field.alias or name}"
        for number, part in enumerate(value if isinstance(value, tuple) else [value]):
            if isinstance(part, BaseModel):
                yield from user_paths(part, f"{place}.{number}." if isinstance(value, tuple) else f"{place}.")
            elif isinstance(value, tuple) and isinstance(part, LocatedPath):
                yield f"{place}.{number}", part
        marks = [mark for mark in field.metadata if isinstance(mark, UserPath)]
        # A default is not validated, and is a path as it is.
        if marks and value is not None and (isinstance(value, LocatedPath) or value == field.default):
            yield place, value
