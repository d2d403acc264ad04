"""The record of a forked run: which run and round it comes from, and the settings of the rounds that it shares."""

from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from data_scoring.base.field_effects import is_free
from data_scoring.base.field_types import Count, PathText
from data_scoring.base.user_paths import BASE
from data_scoring.base.validation import read_record, validated
from flows.run.config import RunConfig

FORK = "fork.json"
# The sections that may differ between the rounds of a run.
SECTIONS = ("train", "score", "refine", "rounds")
_REMEDY = "restore it from a copy, or delete the run folder and fork again"


class Earlier(TypedDict):
    """The settings of the rounds before round `before`: the fields of each section that decide results."""

    before: Count
    sections: dict[str, dict[str, Any]]


class ForkRecord(TypedDict):
    """Where a fork comes from: the run's folder, the first round that is not shared, and the earlier settings."""

    run: PathText
    round: Count
    earlier: list[Earlier]


def read_fork(folder: Path) -> ForkRecord | None:
    """Return the record of the forked run in `folder`, or None if the run is not a fork."""
    return read_record(folder / FORK, ForkRecord, _REMEDY)


def settings_of(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Return the fields of `SECTIONS` that decide results, as a record holds them."""
    values = config.model_dump(mode="json")
    return {
        section: {field: value for field, value in values[section].items() if not is_free(config, f"{section}.{field}")}
        for section in SECTIONS
    }


def config_at(config: RunConfig, folder: Path, place: int) -> RunConfig:
    """Return the configuration of the stages at `place` of the run in `folder`, whose current one is `config`.

    place: 0 before the first round, then the number of the round. Rounds that a fork shares keep their settings.
    """
    record = read_fork(folder)
    earlier = [] if record is None else [entry for entry in record["earlier"] if place < entry["before"]]
    if not earlier:
        return config
    # Fields that say how a run computes, such as the layout, need not go with earlier settings: these rounds are done.
    sections = {}
    for name, fields in earlier[0]["sections"].items():
        values = {**getattr(config, name).model_dump(), **fields}
        kind, origin = type(getattr(config, name)), f"{folder / FORK}: {name}"
        sections[name] = validated(kind, values, origin, _REMEDY, {BASE: config.base})
    return config.model_copy(update=sections)


def describe_fork(folder: Path) -> str | None:
    """Return where the run in `folder` was forked from, or None if it is not a fork."""
    record = read_fork(folder)
    return None if record is None else f"forked from {record['run']} at round {record['round']}"
