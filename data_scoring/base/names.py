"""A configuration field whose values are the names in a table, to which entries may be added at run time."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticKnownError, core_schema


@dataclass(frozen=True)
class OneOf:
    """Annotates a `str` that has to be among `names()`: validated so, and listed in the field's JSON schema."""

    names: Callable[[], Iterable[str]]

    def check(self, name: str) -> str:
        """Return `name`. Raises what pydantic raises for a wrong literal where it is none of the names."""
        names = list(self.names())
        if name not in names:
            *others, last = map(repr, names)
            raise PydanticKnownError("literal_error", {"expected": f"{', '.join(others)} or {last}"})
        return name

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "enum": list(self.names())}
