"""Numbers of configurations: every integer field and every float field reads and refuses the same notations."""

from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from data_scoring.base.field_effects import section_of
from flows.experiments.search_space import SearchConfig
from flows.run.config import RunConfig
from flows.run.launcher_kinds import LAUNCHER_KINDS


def _fields(model: type[BaseModel]) -> Iterator[tuple[type[BaseModel], str, type]]:
    for name, field in model.model_fields.items():
        kinds = {kind for kind in (field.annotation, *get_args(field.annotation)) if kind in (int, float)}
        yield from ((model, field.alias or name, kind) for kind in kinds)
        inner = section_of(field.annotation)
        if inner is not None:
            yield from _fields(inner)


FIELDS = sorted(
    {*_fields(RunConfig), *_fields(SearchConfig)}, key=lambda field: (field[0].__name__, field[1], field[2].__name__)
)
_KINDS = {kind: [(model, name) for model, name, other in FIELDS if other is kind] for kind in (int, float)}


def _errors(model: type[BaseModel], name: str, value: Any) -> list[str]:
    """Return the kinds of errors in the field `name` of `model`."""
    try:
        model.model_validate({name: value})
    except ValidationError as error:
        return [detail["type"] for detail in error.errors() if detail["loc"][:1] == (name,)]
    return []


def test_the_fields_are_found() -> None:
    assert LAUNCHER_KINDS
    assert {kind: len(fields) > 20 for kind, fields in _KINDS.items()} == {int: True, float: True}


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), ".inf", "inf", "nan", "1e400"])
@pytest.mark.parametrize(("model", "name"), _KINDS[float])
def test_floats_are_finite(model: type[BaseModel], name: str, value: Any) -> None:
    assert _errors(model, name, value)


@pytest.mark.parametrize("value", [True, False, 10**400, 2**64, "x", [], {}])
@pytest.mark.parametrize(("model", "name"), _KINDS[float] + _KINDS[int])
def test_other_values_are_refused(model: type[BaseModel], name: str, value: Any) -> None:
    assert _errors(model, name, value)


@pytest.mark.parametrize("value", [1.5, "1.5", "1.5e0", "1e-1", "1e400", float("inf"), "1e19", 2**63, -(2**63) - 1])
@pytest.mark.parametrize(("model", "name"), _KINDS[int])
def test_integers_are_whole_and_of_64_bits(model: type[BaseModel], name: str, value: Any) -> None:
    assert _errors(model, name, value)


@pytest.mark.parametrize("value", ["6.4e1", "64e0", 64.0, "+640e-1"])
@pytest.mark.parametrize(("model", "name"), _KINDS[int])
def test_whole_numbers_are_integers(model: type[BaseModel], name: str, value: Any) -> None:
    """64 in other notations is accepted where 64 is, and refused for the same reason where it is not."""
    assert _errors(model, name, value) == _errors(model, name, 64)
    if not _errors(model, name, 64):
        try:
            found = getattr(model.model_validate({name: value}), name)
        except ValidationError:
            return
        assert type(found) is int
        assert found == 64
