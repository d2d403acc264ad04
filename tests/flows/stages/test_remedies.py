"""Remedies of errors about damaged files work as they are worded, and nothing that was trained is lost by them."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from data_scoring.base.files import write_json
from data_scoring.base.progress import silent
from flows.cli.main import main
from flows.run.config import parse_config
from flows.run.folder import Run, open_run, read_run
from flows.stages.stage_order import complete, complete_all, stages_of, steps_of
from flows.stages.status import read_status
from tests.conftest import MakeOnce
from tests.flows.fakes import FakeRanks, fake_ranks, values
from tests.flows.stages.test_verification import STOPS, make_runs, results
from trainer.checkpoint_folder import list_checkpoints


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> FakeRanks:
    return fake_ranks(monkeypatch)


@pytest.fixture
def folder(make_once: MakeOnce, tmp_path: Path, ranks: FakeRanks) -> Path:
    """A finished run."""
    return Path(shutil.copytree(make_once("verified", make_runs) / STOPS[-1], tmp_path / "x"))


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([*arguments]) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_a_damaged_run_yaml_is_copied_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = read_run(folder)
    config = run.config.model_copy(update={"output": str(folder.parent), "name": folder.name})
    open_run(config)
    whole = (folder / "run.yaml").read_bytes()
    (folder / "run.yaml").write_bytes(whole[:200])
    assert "restore it from a copy, such as " in error_of(capsys, "report", str(folder))
    # Nor may another configuration take its place.
    (folder / "run.yaml").unlink()
    other = config.model_copy(update={"seed": 7})
    with pytest.raises(ValueError, match=r"run.yaml: missing; copy run.yaml.bak to run.yaml"):
        open_run(other)
    shutil.copy(folder / "run.yaml.bak", folder / "run.yaml")
    assert (folder / "run.yaml").read_bytes() == whole
    assert {row.state for row in read_status(folder)} == {"done"}
    with pytest.raises(ValueError, match="created by another configuration"):
        open_run(other)


def test_a_corpus_that_rounds_trained_on_is_not_replaced_by_itself(folder: Path) -> None:
    run, expected = read_run(folder), results(folder)
    (folder / "corpus" / "shard-0000.bin").unlink()
    with pytest.raises(ValueError, match=r"if the sources' text is the same, move .*rounds away, delete .*corpus, pr"):
        stages_of(run).verify()
    (folder / "corpus" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="missing, but rounds were trained on this corpus; restore it from a copy, or"):
        complete(run, "prepare", 0, silent)
    (folder / "rounds").rename(folder.parent / "rounds")
    shutil.rmtree(folder / "corpus")
    complete(run, "prepare", 0, silent)
    (folder.parent / "rounds").rename(folder / "rounds")
    # Refining wrote the list of near duplicates to the corpus' folder.
    with pytest.raises(ValueError, match=r"near-duplicates.*it is missing; .*delete it and .*refine.json"):
        stages_of(run).verify()
    (folder / "rounds" / "2" / "refine.json").unlink()
    for step in steps_of(run.config):
        complete(run, step.stage.name, step.round_number, silent)
    assert results(folder) == expected


def test_a_checkpoint_of_other_training_keeps_its_records(folder: Path) -> None:
    run = read_run(folder)
    [checkpoint] = list_checkpoints(folder / "rounds" / "1" / "checkpoint")
    (checkpoint / "reprise.json").write_text(json.dumps({"step": 3, "fingerprint": "another"}))
    record = folder / "rounds" / "1" / "train.json"
    content = json.loads(record.read_text())
    content.pop("record_checksum")
    record.write_text(json.dumps({**content, "fingerprint": "another"}))
    before = results(folder)
    with pytest.raises(ValueError, match="was trained with another configuration, corpus, mix or initial checkpoint"):
        complete(run, "train", 1, silent)
    assert record.exists()
    assert results(folder) == before


def test_a_round_that_trains_is_not_approved_anew(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = yaml.safe_load((folder / "run.yaml").read_text())
    content["config"]["rounds"]["approval"] = True
    (folder / "run.yaml").write_text(yaml.safe_dump({name: content[name] for name in ("config", "versions")}))
    (folder / "rounds" / "2" / "train.json").unlink()
    said = error_of(capsys, "approve", str(folder), "--round", "2", "--sampling-rate", "0.9")
    assert "round 2 has begun to train on what was approved before; move " in said
    assert main(["approve", str(folder), "--round", "2"]) == 0


def follow(capsys: pytest.CaptureFixture[str], *command: str) -> list[str]:
    """Do what each error of a command advises until the command succeeds; return the advised commands."""
    advised: list[str] = []
    while main([*command]) != 0:
        [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        found = re.search("`reprise ([^`]+)`", line)
        assert found is not None, line
        assert found[1] not in advised, line
        advised.append(found[1])
        name, *rest = shlex.split(found[1])
        if name == "run":
            run = read_run(Path(rest[0]))
            complete_all(run, steps_of(run.config), silent)
        else:
            advised += follow(capsys, name, *rest)
    return [each.partition(" ")[0] for each in advised]


@pytest.mark.parametrize(
    ("num_rounds", "done", "command", "advised"),
    [
        (2, "all", ["refine", "--dry-run", "--round", "3"], ["score"]),
        (2, "prepare", ["refine", "--dry-run", "--round", "3"], ["score", "run"]),
        (2, "prepare", ["refine", "--dry-run"], ["run"]),
        (2, "prepare", ["score", "--round", "2"], ["run"]),
        (2, "prepare", ["train", "--round", "2"], ["run"]),
        (1, "all", ["refine", "--dry-run"], ["score"]),
        (1, "all", ["score"], []),
    ],
)
def test_advised_commands_help(
    num_rounds: int, done: str, command: list[str], advised: list[str], texts: Path, tmp_path: Path, ranks: FakeRanks,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config = parse_config({**values(texts, tmp_path), "rounds": {"num_rounds": num_rounds}}, "test")
    run = open_run(config)
    steps = steps_of(config)
    complete_all(run, steps if done == "all" else steps[:1], silent)
    assert follow(capsys, command[0], str(run.folder), *command[1:]) == advised


BEGINNINGS = {
    "source": ({"corpus": {"sources": [{"name": "a", "path": "missing.jsonl"}]}}, "no file matches"),
    "tokenizer": ({"tokenizer": {"path": "missing.json"}}, "missing.json: no such file"),
    "device": ({"device": "npu"}, "torch-npu is not installed"),
    "vocabulary": ({"model": {"vocab_size": 200}}, "smaller than the tokenizer's vocabulary"),
    "reference": ({"refine": {"policy": "excess", "reference": "nowhere"}}, "has no losses"),
}


@pytest.mark.parametrize("mistake", BEGINNINGS)
def test_a_start_that_fails_leaves_no_run(
    mistake: str, texts: Path, tmp_path: Path, ranks: FakeRanks, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong, error = BEGINNINGS[mistake]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**values(texts, tmp_path / "runs"), **wrong}))
    assert error in error_of(capsys, "prepare", str(path))
    assert not (tmp_path / "runs" / "x").exists()


def test_a_start_that_fails_in_a_folder_with_anything_else_keeps_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (folder / "run.yaml").read_bytes()
    (folder / "rounds").rename(tmp_path / "rounds")
    shutil.rmtree(folder / "corpus")
    run = read_run(folder)
    missing = [source.model_copy(update={"path": "missing"}) for source in run.config.corpus.sources]
    config = run.config.model_copy(update={"corpus": run.config.corpus.model_copy(update={"sources": tuple(missing)})})
    with pytest.raises(ValueError, match="no file matches"):
        complete(Run(config, folder), "prepare", 0, silent)
    assert (folder / "run.yaml").read_bytes() == before


def test_what_is_left_of_a_run_is_told(
    texts: Path, tmp_path: Path, ranks: FakeRanks, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**values(texts, tmp_path / "runs"), "rounds": {"num_rounds": 1}}))
    folder = tmp_path / "runs" / "x"
    monkeypatch.setattr("flows.orchestration.here.run_here", lambda flow, config: folder / "report.html")
    assert main(["prepare", str(path)]) == 0
    capsys.readouterr()
    for target in (path, folder):
        assert main(["run", str(target)]) == 0
        assert capsys.readouterr().err == "resuming at mix 1\n"
    checkpoint = folder / "rounds" / "1" / "checkpoint" / "step-00000040"
    assert main(["train", str(path)]) == 0
    capsys.readouterr()
    assert main(["run", str(path)]) == 0
    assert capsys.readouterr().err == (
        f"nothing to do: all stages are done; verifies files and writes {folder / 'report.html'} again\n"
    )
    (folder / "rounds" / "1" / "train.json").unlink()
    write_json(checkpoint / "reprise.json", {"step": 40, "num_steps": 130})
    shutil.rmtree(list_checkpoints(checkpoint.parent)[-1])
    assert main(["run", str(path)]) == 0
    assert capsys.readouterr().err == "resuming at train 1, last checkpoint at step 40 of 130\n"


@pytest.mark.parametrize("number", [-3, 1, 99])
@pytest.mark.parametrize("command", [["refine", "--dry-run"], ["refine"], ["approve"]])
def test_a_round_that_no_command_makes_is_named(
    command: list[str], number: int, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = error_of(capsys, command[0], str(folder), *command[1:], "--round", str(number))
    assert "`reprise" not in said
    assert (
        f"{number} is not between 2 and" in said or f"score of round {number - 1}: its rounds.num_rounds is 2" in said
    )


@pytest.mark.parametrize("command", [["refine"], ["approve"], ["refine", "--round", "2"], ["approve", "--round", "2"]])
def test_a_run_of_one_round_refines_nothing(
    command: list[str], texts: Path, tmp_path: Path, ranks: FakeRanks, capsys: pytest.CaptureFixture[str]
) -> None:
    run = open_run(parse_config({**values(texts, tmp_path), "rounds": {"num_rounds": 1}}, "test"))
    complete(run, "prepare", 0, silent)
    said = error_of(capsys, command[0], str(run.folder), *command[1:])
    assert "a run with rounds.num_rounds 1 has no refine; raise rounds.num_rounds" in said
