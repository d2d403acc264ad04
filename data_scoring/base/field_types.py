"""Types of configuration fields: numbers that are what was written, and texts that are paths."""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

_INT64 = range(-(2**63), 2**63)
# PyYAML reads 1e6 as a text: YAML 1.1 wants 1.0e+6.
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


# An integer of 64 bits; whole numbers in other notations are accepted: 1e6 and 3.0, but not 1.5, true or 1e30.
Integer = Annotated[int, BeforeValidator(_as_integer)]
# A path, URL or glob that the system's functions can take.
PathText = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00]+$")]
# A number of things, in a record.
Count = Annotated[int, Field(ge=0, lt=2**53)]
# A float; `Config` makes all floats finite. true and false are not accepted.
Number = Annotated[float, BeforeValidator(_as_number)]
