"""What a field of the configuration decides, as a mark in its annotation: `jobs: Annotated[int, FREE] = 1`.

A field without a mark decides all results of its section: it is in every fingerprint of a stage that reads the section,
and a run goes on only where it is the same. There are two marks, `Decides` and `Neutral`. The mark of a section holds
for all fields in it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

# In place of a stage: what a trained model computes, whatever it was trained from.
INFERENCE = "inference"


@dataclass(frozen=True)
class Decides:
    """The mark of a field that decides the results of some stages alone.

    stages: their names; the field is in their fingerprints and in no other's. Without any the field is free: it says
    where, how fast or for how long a run computes, and may change when the run goes on.
    unless: a field of the marked section, and the value with which the section decides everything nonetheless.
    """

    stages: tuple[str, ...] = ()
    unless: tuple[str, str] | None = None


FREE = Decides()


@dataclass(frozen=True)
class Neutral:
    """The mark of a field that came after 0.3: with this value, results are what they were without the field.

    Fingerprints leave the field out where it has the value, so that runs from before go on.

    is_in_name: whether the generated name of a run without a name depends on it even then; not so since 0.11.
    """

    value: Any
    is_in_name: bool = True


def deciding(section: BaseModel, stage: str, keep_neutral: bool = False) -> dict[str, Any]:
    """Return the fields of `section` that decide the results of `stage`, without those that have their neutral value.

    keep_neutral: for stages that are younger than such fields, and always had them in their fingerprints.
    """
    fields = type(section).model_fields
    others = {name for name, field in fields.items() if (mark := mark_of(field)) and stage not in mark.stages}
    if not keep_neutral:
        others |= {
            name
            for name, field in fields.items()
            for mark in field.metadata
            if isinstance(mark, Neutral) and mark.value == getattr(section, name)
        }
    return section.model_dump(exclude=others)


def is_in_name(config: BaseModel, name: str) -> bool:
    """Return whether the generated name of a run of `config` depends on a field, such as refine.within."""
    if is_free(config, name):
        return False
    value: Any = config
    for part, field in _fields_on_the_way(type(config), name):
        value = getattr(value, part, None)
        if any(isinstance(mark, Neutral) and not mark.is_in_name and mark.value == value for mark in field.metadata):
            return False
    return True


def is_free(config: BaseModel, name: str) -> bool:
    """Return whether a field, such as train.micro_batch_size, may change when a run of `config` goes on."""
    found = find_mark(type(config), name)
    if found is None or found[1].stages:
        return False
    path, mark = found
    if mark.unless is None:
        return True
    field, value = mark.unless
    return bool(getattr(reduce(getattr, path.split("."), config), field) != value)


def find_mark(model: type[BaseModel], name: str) -> tuple[str, Decides] | None:
    """Return the mark that holds for the field `name` of `model` with the name of the field that bears it, or None."""
    path: list[str] = []
    for part, field in _fields_on_the_way(model, name):
        path.append(part)
        mark = mark_of(field)
        if mark is not None:
            return ".".join(path), mark
    return None


def mark_of(field: FieldInfo) -> Decides | None:
    """Return a field's own mark of what it decides, or None where it has none."""
    return next((mark for mark in field.metadata if isinstance(mark, Decides)), None)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a field of this type is, lists or may be, or None where it holds plain values."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := section_of(part))), None)


def _fields_on_the_way(model: type[BaseModel], name: str) -> Iterator[tuple[str, FieldInfo]]:
    section: type[BaseModel] | None = model
    for part in name.split("."):
        # The place in a list.
        if section is None or part.isdigit():
            continue
        field = next(field for key, field in section.model_fields.items() if part in (key, field.alias))
        yield part, field
        section = section_of(field.annotation)
