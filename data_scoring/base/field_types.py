"""Types of configuration fields: numbers that are what was written, and texts that are paths, names or patterns."""

import re
import unicodedata
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

_INT64 = range(-(2**63), 2**63)
# PyYAML reads 1e6 as a text: YAML 1.1 wants 1.0e+6.
_MOST_NAME_BYTES = 200
_SCIENTIFIC = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+")


def whole(value: Any) -> Any:
    """Return `value`, as an integer where it is a whole number in another notation: 3.0, or the text 1e6."""
    if isinstance(value, str) and _SCIENTIFIC.fullmatch(value.strip()):
        number = float(value)
    elif isinstance(value, float):
        number = value
    else:
        return value
    # Not so for infinity and NaN, whose remainder is NaN.
    return int(number) if number % 1 == 0 else value


def _as_integer(value: Any) -> Any:
    _refuse_boolean(value)
    value = whole(value)
    if isinstance(value, int) and value not in _INT64:
        raise PydanticCustomError("integer", "integer should fit into 64 bits")
    return value


def _as_number(value: Any) -> Any:
    _refuse_boolean(value)
    if isinstance(value, int) and value not in _INT64:
        raise PydanticCustomError("number", "integer should fit into 64 bits; write it with an exponent, as 1e20")
    return value


def _refuse_boolean(value: Any) -> None:
    if isinstance(value, bool):
        raise PydanticCustomError("number", "input should be a number, not true or false")


@dataclass(frozen=True)
class Pattern:
    """Annotates a `str` that has to match a regular expression; `rule` says in words what it should be."""

    expression: str
    rule: str

    def check(self, text: str) -> str:
        """Return `text`. Raises what pydantic shows as an error of the field, with the rule, if it does not match."""
        if re.fullmatch(self.expression, text) is None:
            raise PydanticCustomError("pattern", "should be {rule}", {"rule": self.rule})
        return text

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "pattern": f"^({self.expression})$"}


def normalised(name: str) -> str:
    """Return `name` in Unicode's normal form C, in which letters with accents are equal however they were typed."""
    return unicodedata.normalize("NFC", name)


def _as_name(text: str) -> str:
    name = normalised(text)
    kinds = [unicodedata.category(letter)[0] for letter in name]
    if (
        not name
        or kinds[0] not in "LN"
        or any(kind not in "LNM" and letter not in "_.-" for kind, letter in zip(kinds, name, strict=True))
    ):
        raise PydanticCustomError(
            "name", "should begin with a letter or digit, of any script, and have only letters, digits and _ . -"
        )
    if len(name.encode()) > _MOST_NAME_BYTES:
        raise PydanticCustomError(
            "name", "should have at most {most} bytes in UTF-8, as it names files", {"most": _MOST_NAME_BYTES}
        )
    return name


# A name that files are named after: letters of any script, in normal form C.
Name = Annotated[str, Field(max_length=_MOST_NAME_BYTES), AfterValidator(_as_name)]
# An integer of 64 bits; whole numbers in other notations are accepted: 1e6 and 3.0, but not 1.5, true or 1e30.
Integer = Annotated[int, BeforeValidator(_as_integer)]
# A path, URL or glob that the system's functions can take.
PathText = Annotated[str, Field(min_length=1, max_length=4096), Pattern(r"[^\x00]+", "a path without null characters")]
# A number of things, in a record.
Count = Annotated[int, Field(ge=0, lt=2**53)]
# A float; `Config` makes all floats finite. true and false are not accepted.
Number = Annotated[float, BeforeValidator(_as_number)]
