"""Forks on real ranks and on fake ones: what they share, what they train, what they refuse, and what a kill leaves."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_scoring.base.files import checksum, making
from data_scoring.base.progress import silent
from flows.cli.main import main
from flows.report.run_report import write_report
from flows.run.folder import Run, read_run
from flows.run.fork_record import read_fork, settings_of
from flows.run.locks import locked
from flows.stages.refine import selection_of
from flows.stages.stage_order import fingerprint_of, stages_of
from flows.stages.status import read_status
from flows.upkeep.fork import fork
from tests import ROOT
from tests.conftest import read_rows
from tests.flows.complete_runs import complete_run, config_of, error_of
from tests.flows.fakes import FakeRanks
from tests.forked_ranks import forking

FILES = ("mix.parquet", "seen/*.parquet", "losses/*.parquet", "selection/*.parquet", "validation-samples.parquet")
# Of the run's folder itself, which no fork shares.
WRITTEN_IN_PLACE = {".lock", ".report.lock", ".ledger.lock", ".verified.json"}


def checksums(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): checksum(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def results(run: Run) -> dict[str, Any]:
    """Return what rounds trained on and gave: checksums of files, and rows of those that hold times."""
    rounds = sorted((run.folder / "rounds").iterdir())
    files = [path for name in FILES for path in sorted(run.folder.glob(f"rounds/*/{name}"))]
    return {
        **{path.relative_to(run.folder).as_posix(): checksum(path) for path in files},
        "steps": [read_rows(folder / "steps.parquet", "step", "loss", "lr", "grad_norm") for folder in rounds],
        "validation": [read_rows(folder / "validation.parquet", "step", "source", "loss") for folder in rounds],
    }


def files_of(run: Run) -> list[Path]:
    return [path for path in run.folder.rglob("*") if path.is_file()]


def states(folder: Path) -> dict[str, str]:
    return {row.name: row.state for row in read_status(folder)}


def test_a_fork_without_changes_gives_what_the_run_gave(original: Run) -> None:
    before = checksums(original.folder)
    made = fork(original, 2, [], None, silent)
    assert made.copied_bytes == 0
    assert made.run.folder == original.folder.with_name("run-fork-2")
    shared = {path.relative_to(original.folder).as_posix() for path in files_of(original) if path.stat().st_nlink > 1}
    assert shared == {name for name in before if name.startswith(("corpus/", "rounds/1/"))}
    assert states(made.run.folder) == {
        **dict.fromkeys(("prepare", "mix 1", "train 1", "score 1"), "done"),
        **{"refine 2": "stopped", "mix 2": "waiting", "train 2": "waiting"},
    }
    with forking():
        complete_run(made.run.config)
    assert results(made.run) == results(original)
    # Neither run has written to a file that they share.
    after = checksums(original.folder)
    assert {name for name in after if after[name] != before.get(name)} <= WRITTEN_IN_PLACE
    # The fork does without its run.
    shutil.rmtree(original.folder)
    assert set(states(made.run.folder).values()) == {"done"}
    assert main(["verify", str(made.run.folder)]) == 0
    assert f"forked from {original.folder} at round 2" in write_report(made.run).read_text()


def test_a_fork_with_another_policy_is_the_run_that_always_had_it(trained_run: Path, original: Run) -> None:
    made = fork(original, 2, ["refine.policy=top"], "hardest", silent)
    with forking():
        complete_run(made.run.config)
        unbroken = complete_run(
            config_of(original.folder.parent, "unbroken", texts=trained_run, refine={"policy": "top"})
        )
    assert results(made.run) == results(unbroken) != results(original)
    for stage, number in (("score", 1), ("refine", 2), ("mix", 2), ("train", 2)):
        assert fingerprint_of(made.run, stage, number) == fingerprint_of(unbroken, stage, number)


def test_earlier_rounds_keep_their_settings(three_rounds: Run, capsys: pytest.CaptureFixture[str]) -> None:
    sets = ["refine.policy=top", "score.budget=seen", "train.lr=0.001", "rounds.num_parts=4"]
    made = fork(three_rounds, 3, sets, "other", silent).run
    assert states(made.folder) == {
        **dict.fromkeys(("prepare", "mix 1", "train 1", "score 1", "refine 2", "mix 2", "train 2"), "done"),
        **{"score 2": "stopped", "refine 3": "waiting", "mix 3": "waiting", "train 3": "waiting"},
    }
    assert not (made.round_folder(2) / "losses").exists()
    for number, (policy, lr, budget) in enumerate([("loss", 1e-3, "full")] * 3 + [("top", 1e-3, "seen")]):
        config = made.config_at(number)
        assert (config.refine.policy, config.score.budget) == (policy, budget)
        assert (config.train.lr == lr) == (number == 3)
        # What says how a run computes is that of today.
        assert config.rounds.num_rounds == 3
    assert made.refine_config(2).policy == "loss"
    assert selection_of(made, 2) == selection_of(three_rounds, 2)
    stages_of(made).verify()
    assert main(["status", str(made.folder)]) == 0
    assert f"forked from {three_rounds.folder} at round 3" in capsys.readouterr().out
    # A dry run of an earlier round with other settings has these.
    assert main(["refine", str(made.folder), "--dry-run", "--round", "2", "--set", "refine.policy=all"]) == 0
    assert "policy all" in capsys.readouterr().out


def test_a_fork_of_a_fork_has_the_settings_of_both(three_rounds: Run, fakes: FakeRanks) -> None:
    first = fork(three_rounds, 3, ["refine.policy=top", "rounds.num_rounds=4"], None, silent).run
    complete_run(first.config)
    expected = {
        1: ["band", "band", "band", "band", "band"],
        2: ["loss", "loss", "band", "band", "band"],
        3: ["loss", "loss", "loss", "band", "band"],
        4: ["loss", "loss", "loss", "top", "band"],
    }
    for number, policies in expected.items():
        made = fork(first, number, ["refine.policy=band"], f"other-{number}", silent).run
        assert [made.config_at(place).refine.policy for place in range(5)] == policies
    # Without changes, each round has the settings that it had there.
    same = fork(first, 2, [], "same", silent).run
    for place in range(1, 5):
        assert settings_of(same.config_at(place)) == settings_of(first.config_at(place))


@pytest.mark.parametrize(("arguments", "message"), [
    (["--round", "4"], "--round: 4 is not between 1 and rounds.num_rounds 3; give one of these rounds, or add it by "
     "--set rounds.num_rounds=4"),
    (["--round", "0"], "--round: 0 is not between 1 and"),
    (["--round", "5", "--set", "rounds.num_rounds=5"], "score 3 is not complete, which a fork at round 5 shares"),
    (["--round", "2", "--name", "run"], "run: exists; give another --name"),
    (["--round", "2", "--name", "a/b"], "--name: "),
    (["--round", "2", "--set", "name=other"], "--set name: a fork is made beside its run; give --name"),
    (["--round", "2", "--set", "seed=1"], "--set seed: concerns the corpus, which a fork shares; start a new run"),
    (["--round", "1", "--set", "corpus.seq_length=8"], "--set corpus.seq_length: concerns the corpus"),
    (["--round", "2", "--set", "model.num_layers=2"], "--set model.num_layers: concerns round 1, which a fork at"),
    (["--round", "2", "--set", "train.max_tokens=99"], "--set train.max_tokens: concerns round 1"),
    (["--round", "2", "--set", "train.precision=bfloat16"], "--set train.precision: concerns round 1"),
    (["--round", "3", "--set", "rounds.first_order=sources"], "--set rounds.first_order: concerns round 1"),
    (["--round", "3", "--set", "refine.sources=[{name: a, from_round: 2}]"], "--set refine.sources.0"),
    (["--round", "3", "--set", "refine.policy=best"], "--set: refine.policy: "),
    (["--round", "2", "--set", "parallel=auto"], "parallel: auto is not resolved here"),
])  # fmt: skip
def test_refusals_are_one_line(
    three_rounds: Run, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    before = sorted(three_rounds.folder.parent.iterdir())
    assert message in error_of(capsys, "fork", str(three_rounds.folder), *arguments)
    assert sorted(three_rounds.folder.parent.iterdir()) == before


def test_round_1_may_have_another_model(three_rounds: Run, fakes: FakeRanks) -> None:
    made = fork(three_rounds, 1, ["model.num_layers=2", "train.max_tokens=2000"], None, silent).run
    assert not (made.folder / "rounds").exists()
    assert read_fork(made.folder) is not None
    complete_run(made.config)
    assert set(states(made.folder).values()) == {"done"}


@pytest.mark.parametrize("sets", [
    ["train.global_batch_size=64", "train.micro_batch_size=64"],
    ["train.global_batch_size=64", "parallel.data=4"],
    ["rounds.num_rounds=100"],
])  # fmt: skip
def test_how_a_fork_computes_need_not_go_with_earlier_rounds(
    three_rounds: Run, fakes: FakeRanks, sets: list[str]
) -> None:
    """Earlier rounds had a smaller batch, or a learning rate that grows too high in so many rounds."""
    first = fork(three_rounds, 2, ["rounds.lr_factor=1.5"], "first", silent).run
    complete_run(first.config)
    made = fork(first, 3, [*sets, "rounds.lr_factor=1"], "second", silent).run
    assert [made.config_at(place).rounds.lr_factor for place in (1, 2, 3)] == [1.0, 1.5, 1.0]
    assert [name for name, state in states(made.folder).items() if state == "done"][-1] == "score 2"
    assert fingerprint_of(made, "train", 2) == fingerprint_of(first, "train", 2)
    stages_of(made).verify()


@pytest.mark.parametrize("name", ["mega (copy)", "\u5b9e\u9a8c \u4e00", "it's"])
def test_a_renamed_run_is_forked(three_rounds: Run, capsys: pytest.CaptureFixture[str], name: str) -> None:
    folder = three_rounds.folder.rename(three_rounds.folder.with_name(name))
    assert "give another --name" in error_of(capsys, "fork", str(folder), "--round", "2")
    assert main(["fork", str(folder), "--round", "2", "--name", "made"]) == 0
    [command] = re.findall("go on by: reprise (.*)", capsys.readouterr().out)
    assert Path(shlex.split(command)[1]).resolve() == folder.with_name("made")
    assert read_run(folder.with_name("made")).config.name == "made"


def test_a_run_in_use_is_not_forked(three_rounds: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(three_rounds.folder):
        message = error_of(capsys, "fork", str(three_rounds.folder), "--round", "2")
    assert "in use by process" in message
    target = three_rounds.folder.with_name("run-fork-2")
    assert not target.exists()
    # As another run's fork of the same name.
    with making(target) as other:
        (other / "run.yaml").touch()
        message = error_of(capsys, "fork", str(three_rounds.folder), "--round", "2")
        assert f"{target}: being made by another process; wait for it, or name another folder" in message
    assert [path.name for path in target.iterdir()] == ["run.yaml"]


def test_rounds_that_are_not_complete_are_named(three_rounds: Run, capsys: pytest.CaptureFixture[str]) -> None:
    three_rounds.forget("train", 2)
    message = error_of(capsys, "fork", str(three_rounds.folder), "--round", "3")
    assert "train 2 is not complete, which a fork at round 3 shares; complete it by `reprise run" in message
    shutil.rmtree(three_rounds.round_folder(1) / "checkpoint")
    message = error_of(capsys, "fork", str(three_rounds.folder), "--round", "2")
    assert "holds no checkpoint for round 2 to start from" in message


def test_what_cannot_be_linked_is_copied_and_said(
    three_rounds: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    assert main(["fork", str(three_rounds.folder), "--round", "2", "--name", "copy"]) == 0
    folder = three_rounds.folder.with_name("copy")
    size = sum(
        path.stat().st_size for part in ("corpus", "rounds") for path in (folder / part).rglob("*") if path.is_file()
    )
    assert f"note: {size:,} bytes were copied" in capsys.readouterr().out


KILLED = """
import os, signal, sys
from flows.upkeep import fork
setattr(fork, sys.argv[1], lambda *arguments: os.kill(os.getpid(), signal.SIGKILL))
from flows.cli.main import main
main(["fork", sys.argv[2], "--round", "2"])
"""


@pytest.mark.parametrize("place", ["share", "write_settings", "refresh_ledger"])
def test_a_killed_fork_is_not_listed(three_rounds: Run, capsys: pytest.CaptureFixture[str], place: str) -> None:
    command = [sys.executable, "-c", KILLED, place, str(three_rounds.folder)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -9
    assert main(["runs", str(three_rounds.folder.parent)]) == 0
    lines = capsys.readouterr().out.splitlines()
    if place == "refresh_ledger":
        # The ledger is made by whoever opens it first.
        assert [line.split()[0] for line in lines] == ["run", "run-fork-2"]
        assert main(["sql", str(three_rounds.folder.with_name("run-fork-2")), "from rounds"]) == 0
        return
    assert [line.split()[0] for line in lines] == ["run"]
    assert main(["fork", str(three_rounds.folder), "--round", "2"]) == 0
    assert "go on by: reprise run " in capsys.readouterr().out
    assert sorted(path.name for path in three_rounds.folder.parent.iterdir() if path.is_dir()) == ["run", "run-fork-2"]
