"""Remedies of errors about damaged files work as they are worded, and nothing that was trained is lost by them."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from data_scoring.base.progress import silent
from flows.cli.main import main
from flows.run.folder import open_run, read_run
from flows.stages.stage_order import complete, stages_of, steps_of
from flows.stages.status import read_status
from tests.conftest import MakeOnce
from tests.flows.fakes import FakeRanks, fake_ranks
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
