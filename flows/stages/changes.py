"""Changes of a run's configuration: allowed where no stage that they concern has begun."""

import json
from dataclasses import replace
from shlex import quote
from typing import Any

from data_scoring.base.field_effects import is_free
from data_scoring.base.yaml_text import parse_yaml
from flows.run.config import RunConfig, differences, override
from flows.run.folder import Run, refusal
from flows.stages.stage_order import stages_of, steps_at


def check_changes(stored: Run, config: RunConfig) -> None:
    """Raise ValueError if the run `stored` cannot go on with `config`, because a stage that it changes has begun.

    The message names the fields, and the command that makes a run with `config` from what is not affected.
    """
    different = differences(stored.config, config)
    place = _first_begun(stored, config, different) if different else None
    if place is None:
        return
    remedy = "set another name, restore the fields, or delete the folder"
    if 0 < place <= config.rounds.num_rounds:
        remedy = f"restore the fields, or fork the run: `{_fork_command(stored, config, place)}`"
    raise ValueError(refusal(stored, different, remedy))


def _first_begun(stored: Run, config: RunConfig, different: list[str]) -> int | None:
    """Return the first place of a stage that has begun and whose inputs differ with `config`, or None.

    0: before the first round; then the number of the round.
    """
    before, after = stages_of(stored), stages_of(replace(stored, config=config))
    # The items that contamination removes are not in the fingerprints of stages before they are read again.
    removes = any(line.startswith("eval.") for line in different)
    # The last round may be scored, too, although no later round is selected by its losses.
    for place in range(stored.config.rounds.num_rounds + 2):
        for step in steps_at(stored.config, place):
            stage, number = step.stage, step.round_number
            if not stage.is_needed(config) or not stage.has_begun(stored, number):
                continue
            if before.fingerprint(stage.name, number) != after.fingerprint(stage.name, number) or (removes and place):
                return place
    return None


def _fork_command(stored: Run, config: RunConfig, place: int) -> str:
    """Return the command that forks the run at round `place` with the fields of `config`."""
    command = f"reprise fork {quote(str(stored.folder))} --round {place}"
    old, new = stored.config.model_dump(mode="json"), config.model_dump(mode="json")
    names = [
        (section, field)
        for section, fields in new.items()
        if isinstance(fields, dict)
        for field in fields
        if fields[field] != (old[section] or {}).get(field)
    ]
    adds_rounds = config.rounds.num_rounds > stored.config.rounds.num_rounds
    overrides = [
        f"{section}.{field}={_text(new[section][field])}"
        for section, field in names
        if not is_free(config, f"{section}.{field}") or (adds_rounds and field == "num_rounds")
    ]
    if differences(override(stored.config, overrides), config):
        # Fields that are derived from others.
        return f"{command} --set FIELD=VALUE"
    return " ".join([command, *(f"--set {quote(each)}" for each in overrides)])


def _text(value: Any) -> str:
    """Return `value` as `--set` reads it."""
    if isinstance(value, str):
        try:
            if parse_yaml(value, "--set") == value:
                return value
        except ValueError:
            pass
    return json.dumps(value, ensure_ascii=False)
