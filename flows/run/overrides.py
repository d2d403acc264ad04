"""Overrides of a configuration's fields: `--set FIELD=VALUE`; entries of lists are named by their number."""

from typing import Any

from pydantic import BaseModel

from data_scoring.base.field_effects import section_of
from data_scoring.base.messages import one_line
from data_scoring.base.yaml_text import parse_yaml


def apply_override(values: dict[str, Any], override: str, section: type[BaseModel]) -> None:
    """Set the field in `values` that `override` names, such as corpus.sources.0.path=a.txt.

    section: the configuration's type, which gives the defaults of lists. Raises ValueError if it names no field.
    """
    origin = f"--set {one_line(override)}"
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ValueError(f"{origin}: not FIELD=VALUE; write for example --set refine.sampling_rate=0.3")
    place: Any = values
    names = path.split(".")
    for depth, name in enumerate(names[:-1]):
        if isinstance(place, list):
            place = place[_index(place, names[: depth + 1], origin)]
        else:
            if names[depth + 1].isdecimal() and not place.get(name):
                place[name] = _default_list(section, names[: depth + 1])
            place = place.setdefault(name, {})
        if not isinstance(place, dict | list):
            raise ValueError(f"{origin}: {one_line(name)} is not a section; name a field such as refine.sampling_rate")
    key = _index(place, names, origin) if isinstance(place, list) else names[-1]
    place[key] = parse_yaml(text, origin)


def with_lists(value: Any) -> Any:
    """Return nested sections with lists in place of tuples."""
    if isinstance(value, dict):
        return {name: with_lists(entry) for name, entry in value.items()}
    return [with_lists(entry) for entry in value] if isinstance(value, list | tuple) else value


def _index(entries: list[Any], names: list[str], origin: str) -> int:
    """Return the place in a list that the last of `names` is. Raises ValueError if there is none."""
    *field, text = names
    if text.isdecimal() and int(text) < len(entries):
        return int(text)
    count = f"{len(entries)} {'entry' if len(entries) == 1 else 'entries'}"
    places = f"give a number from 0 to {len(entries) - 1}, or" if entries else "give"
    raise ValueError(
        f"{origin}: {one_line(text)} is no entry of {one_line('.'.join(field))}, which has {count}; {places} the whole "
        "list"
    )


def _default_list(section: type[BaseModel], names: list[str]) -> list[Any]:
    """Return the default of a list's field as a list; empty if the field has none."""
    found: type[BaseModel] | None = section
    default: Any = None
    for name in names:
        fields = {} if found is None else {field.alias or key: field for key, field in found.model_fields.items()}
        if name not in fields:
            return []
        default, found = fields[name].default, section_of(fields[name].annotation)
    entries = default if isinstance(default, tuple) else ()
    return [each.model_dump() if isinstance(each, BaseModel) else each for each in entries]
