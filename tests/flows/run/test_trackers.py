"""The field `track`: what it accepts, what it refuses in one line, and what does not depend on it."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest

from data_scoring.base.user_paths import typed
from flows.run.allowed_paths import check_paths
from flows.run.config import RunConfig, differences, override, parse_config
from flows.run.trackers import TRACKER_KINDS, TrackerConfig, check_trackers
from tests import ROOT

VALUES: dict[str, Any] = {"name": "x", "corpus": {"sources": [{"name": "a", "path": "a.jsonl"}]}}


def parse(track: Any) -> RunConfig:
    return parse_config({**VALUES, "track": track}, "c.yaml")


def test_a_name_stands_for_default_settings() -> None:
    assert parse(["mlflow"]).track == parse([{"name": "mlflow"}]).track == (TrackerConfig(name="mlflow"),)
    config = override(parse_config(VALUES, "c.yaml"), ["track=[tensorboard, {name: mlflow, uri: http://host:5000}]"])
    assert [(tracker.name, tracker.uri) for tracker in config.track] == [
        ("tensorboard", None),
        ("mlflow", "http://host:5000"),
    ]
    assert parse_config(config.model_dump(mode="json"), "again").track == config.track


@pytest.mark.parametrize(
    ("track", "error"),
    [
        (["neptune"], "c.yaml: track.0.name: input should be 'tensorboard', 'wandb', 'mlflow' or 'trackio' (it is 'n"),
        ("wandb", "c.yaml: track: input should be a list (it is 'wandb'); correct it"),
        (["wandb", {"name": "wandb", "project": "p"}], "c.yaml: track: wandb is listed more than once; leave the"),
        ([{"name": "wandb", "url": "x"}], "c.yaml: track.0.url: unknown field; did you mean uri?"),
        ({}, "c.yaml: track: input should be a list (it is {}); correct it"),
        ([{"name": "mlflow", "uri": "http://me:secret@host"}], "c.yaml: track.0.uri: holds a password, which would"),
        (
            [{"name": "mlflow", "uri": "postgresql://me:s@secret@host/db"}],
            "c.yaml: track.0.uri: holds a password, which",
        ),
        ([{"project": "p"}], "c.yaml: track.0.name: field required; correct it"),
        ([{"name": "wandb", "project": "a/b"}], "c.yaml: track.0.project: should begin with a letter or digit"),
    ],
)
def test_mistakes_are_one_line(track: Any, error: str) -> None:
    with pytest.raises(ValueError) as raised:
        parse(track)
    assert str(raised.value).startswith(error)
    assert "\n" not in str(raised.value)
    assert "secret" not in str(raised.value)


def test_neither_name_nor_results_depend_on_it() -> None:
    nameless = {**VALUES, "name": None}
    config, tracked = (parse_config({**nameless, "track": track}, "c") for track in ([], ["wandb"]))
    assert config.run_name == tracked.run_name == parse_config(nameless, "c").run_name
    assert differences(config, tracked) == differences(tracked, config) == []


def test_the_schema_of_deployments_accepts_both_forms() -> None:
    schema = RunConfig.model_json_schema()
    for track in (["wandb"], [{"name": "wandb", "project": "p"}], []):
        jsonschema.validate({"track": track}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"track": ["neptune"]}, schema)


def test_deployed_flows_send_to_no_address_of_their_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    allowed = [tmp_path]
    check_paths(parse([{"name": "tensorboard", "uri": "logs"}]), allowed)
    for uri in ("http://host:5000", "/elsewhere", "../out"):
        config = parse([{"name": "mlflow", "uri": uri}])
        assert typed(config.track[0].uri) == uri
        with pytest.raises(ValueError, match=r"^track\.0\.uri: "):
            check_paths(config, allowed)


def test_every_tracker_has_an_extra_and_a_class() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert TRACKER_KINDS.keys() <= extras.keys()
    for kind in TRACKER_KINDS.values():
        module = kind.tracker.partition(":")[0]
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists()


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.run.trackers.find_spec", lambda name: None if name == "mlflow" else object())
    check_trackers(parse(["wandb"]).track)
    with pytest.raises(
        ValueError, match=r"^track: mlflow is not installed; .* `pip install 'reprise-lm\[mlflow\]'`, or"
    ):
        check_trackers(parse(["wandb", "mlflow"]).track)
