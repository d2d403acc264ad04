import copy
import os
import pickle
import pwd
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from data_scoring.base.user_paths import LocatedPath, UserPath, expand_home, locate, user_paths
from flows.run.allowed_paths import check_paths
from flows.run.config import RunConfig, parse_config


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home [1]"
    (home / "data[2]").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    return home


def test_a_path_is_located_once_and_stored_as_typed(home: Path, tmp_path: Path) -> None:
    me = pwd.getpwuid(os.getuid())
    (tmp_path / "~$lock").touch()
    base = tmp_path / "b*"
    for typed, here, elsewhere in (
        ("~", str(home), str(home)),
        ("~/data[2]", f"{home}/data[2]", f"{home}/data[2]"),
        ("~/*.jsonl", f"{tmp_path}/home [[]1]/*.jsonl", f"{tmp_path}/home [[]1]/*.jsonl"),
        (f"~{me.pw_name}/x", f"{me.pw_dir}/x", f"{me.pw_dir}/x"),
        ("x/y.jsonl", "x/y.jsonl", f"{base}/x/y.jsonl"),
        ("x/*.jsonl", "x/*.jsonl", f"{tmp_path}/b[*]/x/*.jsonl"),
        ("../x", "../x", f"{base}/../x"),
        ("/abs/~/x", "/abs/~/x", "/abs/~/x"),
        ("./~/x", "./~/x", f"{base}/~/x"),
        ("s3://bucket/~", "s3://bucket/~", "s3://bucket/~"),
    ):
        assert locate(typed, tmp_path) == here
        assert locate(typed, base) == elsewhere
    assert locate("~$lock", tmp_path) == str(tmp_path / "~$lock")
    assert locate("~nobody-of-this-name/x", tmp_path) is None
    with pytest.raises(ValueError, match="no such user"):
        expand_home("~nobody-of-this-name/x")


# Every field that holds a path, by its name and a value.
FIELDS = {
    "output": "P",
    "corpus": {"sources": [{"name": "a", "path": "P"}, {"name": "b", "path": "P", "format": "text"}]},
    "tokenizer": {"path": "P"},
    "model": {"start_from": "P"},
    "refine": {"reference": "P"},
    "eval": {"data": "P"},
}


def filled(value: Any, path: str) -> Any:
    if isinstance(value, dict):
        return {key: filled(each, path) for key, each in value.items()}
    if isinstance(value, list):
        return [filled(each, path) for each in value]
    return path if value == "P" else value


@pytest.mark.parametrize("inherits", [False, True])
def test_every_path_of_a_configuration_is_located(inherits: bool, home: Path, tmp_path: Path) -> None:
    fields = {**FIELDS, "name": "x"}
    if inherits:
        fields["model"] = {"inherit": {"from": "P"}}
    config = parse_config(filled(fields, "~/data[2]"), "test")
    found = dict(user_paths(config))
    assert set(found.values()) == {f"{home}/data[2]"}
    assert len(found) == 7
    assert config.folder == home / "data[2]" / "x"
    moved = parse_config(filled(fields, "rel"), "test", tmp_path / "elsewhere")
    assert set(dict(user_paths(moved)).values()) == {str(tmp_path / "elsewhere" / "rel")}
    for each in (moved, copy.deepcopy(moved), pickle.loads(pickle.dumps(moved)), moved.model_copy()):
        assert each.base == tmp_path / "elsewhere"
        assert each.model_dump() == parse_config(filled(fields, "rel"), "test").model_dump()
        assert type(each.model_dump()["output"]) is str
        assert each.model_dump(mode="json")["corpus"]["sources"][0]["path"] == "rel"


def test_no_field_that_holds_a_path_is_without_its_mark() -> None:
    words = ("folder", "file", "path")
    plain = {"text_field", "sql", "budget", "name", "options", "max_restarts", "rendezvous", "nodes", "tied_embeddings"}

    def unmarked(model: type[BaseModel]) -> list[str]:
        found = []
        for name, field in model.model_fields.items():
            annotation = str(field.annotation)
            is_path = any(isinstance(mark, UserPath) for mark in field.metadata) or "TaskEntry" in annotation
            if "str" in annotation and "Literal" not in annotation and not is_path:
                description = (field.description or "").lower()
                found += [name] if any(word in description for word in words) and name not in plain else []
        return found

    sections = [RunConfig]
    for model in sections:
        for field in model.model_fields.values():
            for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
                if isinstance(part, type) and issubclass(part, BaseModel):
                    sections.append(part)
    assert {name for model in sections for name in unmarked(model)} == set()


def test_names_are_no_paths(tmp_path: Path) -> None:
    sources = [
        {"name": "a", "format": "python", "path": "topics"},
        {"name": "b", "format": "datasets", "path": "org/name"},
        {"name": "c", "format": "datasets", "path": "local"},
    ]
    (tmp_path / "elsewhere" / "local").mkdir(parents=True)
    values = {"name": "x", "output": str(tmp_path / "runs"), "corpus": {"sources": sources}}
    config = parse_config(values, "test", tmp_path / "elsewhere")
    assert [source.path for source in config.corpus.sources] == ["topics", "org/name", f"{tmp_path}/elsewhere/local"]
    assert [isinstance(source.path, LocatedPath) for source in config.corpus.sources] == [False, False, True]
    check_paths(config, [tmp_path])
    with pytest.raises(ValueError, match=r"^corpus\.sources\.2\.path: 'local' lies outside"):
        check_paths(config, [tmp_path / "runs"])


def test_an_unknown_user_is_named_but_does_not_bar_a_stored_configuration(tmp_path: Path) -> None:
    values = {"name": "x", "corpus": {"sources": [{"name": "a", "path": "~nobody-of-this-name/x"}]}}
    with pytest.raises(ValueError, match=r"^test: corpus\.sources\.0\.path: no such user; write \./~"):
        parse_config(values, "test")
    assert parse_config(values, "test", tmp_path).corpus.sources[0].path == "~nobody-of-this-name/x"


def test_entries_of_tasks_are_names_or_paths(tmp_path: Path) -> None:
    config = parse_config({"eval": {"tasks": ["piqa", "tasks/mine.yaml", "mine.yaml"]}}, "test", tmp_path / "other")
    assert config.eval.tasks == ("piqa", f"{tmp_path}/other/tasks/mine.yaml", f"{tmp_path}/other/mine.yaml")
    assert config.model_dump()["eval"]["tasks"] == ("piqa", "tasks/mine.yaml", "mine.yaml")
    found = [(field, str(path)) for field, path in user_paths(config) if "tasks" in field]
    assert found == [
        ("eval.tasks.1", f"{tmp_path}/other/tasks/mine.yaml"),
        ("eval.tasks.2", f"{tmp_path}/other/mine.yaml"),
    ]
