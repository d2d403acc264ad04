"""A run folder from another working folder: relative paths of its configuration count from where it was started."""

import shutil
from pathlib import Path

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
