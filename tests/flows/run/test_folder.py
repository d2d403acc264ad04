"""A run folder from another working folder: relative paths of its configuration count from where it was started."""

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from flows.cli.main import main
from flows.run.folder import read_run
from tests.flows.fakes import FakeRanks, values, write_texts

GOLDEN = Path(__file__).parents[1] / "stages" / "golden"


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder whose configuration holds relative paths alone; the process is in another."""
    started = tmp_path / "started"
    started.mkdir()
    write_texts(started)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_alone = Tokenizer(models.BPE({"<|endoftext|>": 0, **{each: 1 + n for n, each in enumerate(alphabet)}}, []))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    bytes_alone.save(str(started / "t.json"))
    config = {**values(Path(), Path("runs")), "tokenizer": {"path": "t.json"}}
    config["model"]["vocab_size"] = 384
    (started / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(started)
    return started


def test_it_goes_on_from_any_working_folder(
    started: Path, tmp_path: Path, fakes: FakeRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["prepare", "config.yaml"]) == 0
    shutil.rmtree("runs/x/corpus")
    monkeypatch.chdir(tmp_path / "elsewhere")
    for stage in ("prepare", "train", "score", "refine"):
        assert main([stage, str(started / "runs" / "x")]) == 0
    assert read_run(started / "runs" / "x").config.base == started
    assert list(Path().iterdir()) == []
    # In the first folder, the configuration is that of the same run.
    monkeypatch.chdir(started)
    assert main(["train", "config.yaml"]) == 0
    assert fakes.jobs == ["x train-1", "x score-1", "x train-2"]


def test_what_is_done_does_not_need_the_tokenizer(
    started: Path, tmp_path: Path, fakes: FakeRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["prepare", "config.yaml"]) == 0
    (started / "t.json").unlink()
    assert main(["prepare", "config.yaml"]) == 0
    assert main(["train", "runs/x"]) == 0


def test_a_project_that_is_moved_as_a_whole_counts_from_its_new_place(
    started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["prepare", "config.yaml"]) == 0
    monkeypatch.chdir(tmp_path)
    started.rename("moved")
    assert read_run(Path("moved/runs/x")).config.tokenizer.path == str(tmp_path / "moved" / "t.json")


def test_runs_that_did_not_record_where_they_started_count_from_above_their_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(GOLDEN, tmp_path / "runs")
    monkeypatch.chdir("/")
    assert read_run(tmp_path / "runs" / "plain").config.base == tmp_path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "plain", tmp_path / "plain"))


@pytest.fixture
def settings(folder: Path) -> dict[str, Any]:
    """What a run.yaml of a version without checksums holds."""
    config = read_run(folder).config.model_dump(mode="json")
    return {"config": config, "started_in": str(folder.parent), "versions": {"torch": "2.5"}}


def places(value: Any) -> list[tuple[Any, ...]]:
    """Return the keys that lead to each value in `value`, at every depth."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(key, *rest) for key, entry in entries for rest in ((), *places(entry))]


def read_damaged(folder: Path, content: Any) -> str:
    """Return the error of reading a run.yaml with `content`; empty if it is read."""
    # JSON is YAML.
    (folder / "run.yaml").write_text(json.dumps(content))
    try:
        read_run(folder)
    except ValueError as error:
        return str(error)
    return ""


MISSING = object()
WRONG = [MISSING, None, True, 5, "", "x\x07", 300 * "x", 5000 * "x", [3], {}, {"a": {"b": []}}]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda value: "missing" if value is MISSING else repr(value)[:20])
def test_each_damaged_field_is_one_line_or_harmless(folder: Path, settings: dict[str, Any], wrong: object) -> None:
    assert read_damaged(folder, settings) == ""
    num_errors = 0
    for *parents, name in places(settings):
        content = place = copy.deepcopy(settings)
        for key in parents:
            place = place[key]
        if wrong is MISSING:
            del place[name]
        else:
            place[name] = wrong
        said = read_damaged(folder, content)
        assert not said or said.startswith(f"{folder / 'run.yaml'}: ")
        assert len(said.splitlines()) <= 1 and len(said) < 2000 and said.isprintable()
        num_errors += said != ""
    assert num_errors >= 4


@pytest.mark.parametrize(
    ("field", "wrong", "message"),
    [
        ("config", MISSING, "damaged: it is incomplete; restore it from a copy"),
        ("config", None, "config: input should be a valid dictionary (it is None); restore it from a copy"),
        ("config.output", MISSING, "config.output: field required; restore it from a copy"),
        ("config.output", 5, "config.output: input should be a valid string (it is 5); restore it from a copy"),
        ("config.name", MISSING, "config.name: field required; restore it from a copy"),
        ("config.name", ["a"], "config.name: input should be a valid string (it is ['a']); restore it from a copy"),
        ("config.seed", "seven", "seed: input should be a valid integer"),
        ("started_in", 5, "started_in: input should be a valid string (it is 5); restore it from a copy"),
        ("versions", None, "versions: input should be a valid dictionary (it is None); restore it from a copy"),
        ("format", "two", "damaged, or edited: its checksum differs from its content; restore it from a copy"),
    ],
)
def test_a_damaged_field_is_named_with_value_and_remedy(
    folder: Path, settings: dict[str, Any], field: str, wrong: object, message: str
) -> None:
    *parents, name = field.split(".")
    place = settings
    for key in parents:
        place = place[key]
    place.pop(name, None)
    if wrong is not MISSING:
        place[name] = wrong
    assert read_damaged(folder, settings).startswith(f"{folder / 'run.yaml'}: {message}")


def test_a_place_that_cannot_be_looked_at_counts_as_gone(
    folder: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    for gone in ("/nowhere", f"/{300 * 'x'}", os.fspath(folder / "run.yaml")):
        assert read_damaged(folder, {**settings, "started_in": gone}) == ""
        assert read_run(folder).config.base == folder
