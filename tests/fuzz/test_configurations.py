"""Whatever is in a configuration: one line of error, or a configuration that is what was asked for."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_scoring.base.yaml_text import read_yaml
from flows.run.config import RunConfig, differences, flatten, parse_config, read_config
from tests.fuzz.cases import check_message, numbers_of_cases, run_cases
from tests.fuzz.configurations import configurations


@numbers_of_cases(200)
def test_configurations(tmp_path: Path, num_cases: int) -> None:
    path = tmp_path / "config.yaml"
    num_accepted = 0

    def check(case: tuple[bytes, list[str]]) -> None:
        nonlocal num_accepted
        content, overrides = case
        path.write_bytes(content)
        try:
            config = read_config(path, overrides)
        except ValueError as error:
            check_message(error, str(path), "--set")
            return
        num_accepted += 1
        _check_values(config)
        _check_round_trip(config, tmp_path / "again.yaml")
        _check_asked(config, content, overrides)

    run_cases(configurations(), check, num_cases)
    assert num_accepted > num_cases / 20


def _check_values(config: RunConfig) -> None:
    for name, value in flatten(config.model_dump()).items():
        if isinstance(value, float):
            assert math.isfinite(value), name
        elif isinstance(value, int):
            assert -(2**63) <= value < 2**63, name
    assert config.run_name
    assert differences(config, config) == []


def _check_round_trip(config: RunConfig, path: Path) -> None:
    values = config.model_dump(mode="json")
    path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
    assert parse_config(read_yaml(path), "again") == config


def _check_asked(config: RunConfig, content: bytes, overrides: list[str]) -> None:
    """Compare with what PyYAML itself reads; the limits are kept, or the configuration would have been refused."""
    asked: dict[str, Any] = yaml.load(content.decode("utf-8-sig"), yaml.CSafeLoader)
    for override in overrides:
        field, _, text = override.partition("=")
        *sections, name = field.split(".")
        place = asked
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = yaml.load(text, yaml.CSafeLoader)
    found = flatten(config.model_dump())
    for name, value in flatten(asked).items():
        # A text that the field reads as a number, or an empty section.
        got = found.get(name)
        if isinstance(got, float | int) and not isinstance(got, bool):
            assert not isinstance(value, bool), name
            assert (float(value) if isinstance(value, str) else value) == got, name
        elif isinstance(got, bool):
            assert value in (
                got,
                *(("yes", "on", "true", "1", "y", "t") if got else ("no", "off", "false", "0", "n", "f")),
            ), name
        else:
            assert value == got, name


@pytest.mark.parametrize("content", [b"\xff", b"a: \xed\xa0\x80", b"\xff\xfea\0:\0"])
def test_other_encodings_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"line 1: not valid YAML \(not UTF-8\); save it as UTF-8"):
        read_yaml(path)
