"""Cleaning: what is offered and what it frees, against the disk's own account; and what still works afterwards."""

import fcntl
import os
import shutil
from pathlib import Path

import pytest

from data_scoring.base.progress import silent
from data_scoring.ledger import read_rows
from flows.cli.main import main
from flows.experiments.arms import rate_comparison
from flows.experiments.compare import compare
from flows.experiments.generation_speed import generation_speed
from flows.run.config import override
from flows.run.folder import Run, open_run, read_run
from flows.run.locks import locked
from flows.stages.stage_order import complete, complete_all, steps_of
from flows.stages.status import is_done, read_status
from flows.upkeep import clean
from flows.upkeep.clean import find_offers
from flows.upkeep.fork import fork
from tests.flows.complete_runs import complete_run, config_of, error_of
from tests.flows.fakes import FakeRanks
from tests.forked_ranks import forking


def used_bytes(*folders: Path) -> int:
    """Return the bytes of the files in `folders`, each file once, whatever its number of names."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    states = [path.lstat() for path in files]
    return sum({(state.st_dev, state.st_ino): state.st_size for state in states}.values())


def fill(folder: Path, num_bytes: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "part").write_bytes(bytes(num_bytes))
    return folder


def offered(folder: Path, *names: str) -> dict[str, int]:
    """Return the bytes that deleting each path frees."""
    return {
        os.path.relpath(path, folder): num_bytes
        for offer in find_offers(folder, names or [*clean.CATEGORIES])
        for path, num_bytes in zip(offer.paths, offer.freed, strict=True)
    }


@pytest.fixture
def littered(three_rounds: Run) -> Run:
    """A run with what kills and stages leave, and with checkpoints of known sizes."""
    for number in (1, 2, 3):
        [checkpoint] = (three_rounds.round_folder(number) / "checkpoint").glob("step-*")
        fill(checkpoint, 1000 * number)
        (checkpoint / "reprise.json").write_text('{"step": 9, "num_steps": 9}')
    fill(three_rounds.round_folder(1) / "checkpoint" / "damaged-step-00000001", 11)
    fill(three_rounds.round_folder(2) / "checkpoint" / ".step-00000002.tmp", 12)
    shutil.copytree(checkpoint, checkpoint.with_name("step-00000000"))
    fill(three_rounds.folder / "corpus" / "staging", 13)
    fill(three_rounds.round_folder(1) / "losses" / "parts", 14)
    fill(three_rounds.folder / ".ledger.sharing" / ".inner.tmp", 15)
    (three_rounds.round_folder(3) / "selection" / ".shard=0000.parquet.77.tmp").write_bytes(bytes(16))
    return three_rounds


def test_what_is_offered_is_what_the_disk_gets_back(littered: Run, capsys: pytest.CaptureFixture[str]) -> None:
    found, folder = offered(littered.folder), littered.folder
    [step_1], [step_2] = ([*(littered.round_folder(n) / "checkpoint").glob("step-*")] for n in (1, 2))
    size = (step_1 / "reprise.json").stat().st_size
    assert found == {
        "rounds/1/checkpoint/damaged-step-00000001": 11,
        "rounds/2/checkpoint/.step-00000002.tmp": 12,
        "corpus/staging": 13,
        "rounds/1/losses/parts": 14,
        ".ledger.sharing": 15,
        "rounds/3/selection/.shard=0000.parquet.77.tmp": 16,
        "rounds/3/checkpoint/step-00000000": 3000 + size,
        os.path.relpath(step_1, folder): 1000 + size,
        os.path.relpath(step_2, folder): 2000 + (step_2 / "reprise.json").stat().st_size,
    }
    before = used_bytes(folder)
    assert main(["clean", str(folder)]) == 0
    assert used_bytes(folder) == before
    out = capsys.readouterr().out
    total = sum(found.values())
    assert f"nothing was deleted; --yes deletes all of this, {total:,} bytes; --only chooses categories" in out
    assert "lost with them: these rounds cannot be evaluated or scored anew, exported, forked after" in out
    assert main(["clean", str(folder), "--only", "checkpoints", "--yes"]) == 0
    freed = found[os.path.relpath(step_1, folder)] + found[os.path.relpath(step_2, folder)]
    assert f"freed {freed:,} bytes" in capsys.readouterr().out
    assert before - used_bytes(folder) == freed
    assert main(["clean", str(folder), "--yes"]) == 0
    assert before - used_bytes(folder) == total
    assert main(["clean", str(folder), "--yes"]) == 0
    assert f"{folder}: nothing to delete" in capsys.readouterr().out


def test_a_cleaned_run_is_complete_and_goes_on(original: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(original.folder)
    rounds = read_rows(original.folder, "from rounds order by round")
    assert main(["clean", folder, "--yes"]) == 0
    assert not [*original.folder.glob("rounds/1/checkpoint/*")]
    for command in ("status", "verify", "report", "advise", "clean"):
        assert main([command, folder]) == 0
    assert {row.state for row in read_status(original.folder)} == {"done"}
    assert read_rows(original.folder, "from rounds order by round") == rounds
    assert fork(original, 1, [], "first", silent).run.folder.exists()
    message = error_of(capsys, "fork", folder, "--round", "2")
    assert "holds no checkpoint for round 2 to start from, perhaps after `reprise clean`" in message
    config = override(original.config, ["rounds.num_rounds=3"])
    with forking():
        run = complete_run(config.model_copy(update={"output": str(original.folder.parent)}))
    assert len(read_rows(run.folder, "from rounds")) == 3


def test_files_of_a_fork_free_nothing(littered: Run, capsys: pytest.CaptureFixture[str]) -> None:
    made = fork(littered, 3, [], "other", silent).run
    complete_run(made.config)
    # What is not shared is freed, and what is empty is not said to be shared.
    [step] = littered.folder.glob("rounds/1/checkpoint/step-*")
    num_shared = used_bytes(step)
    (step / "own").write_bytes(bytes(17))
    shutil.rmtree(littered.folder / "corpus" / "staging")
    (littered.folder / "corpus" / "staging").mkdir()
    capsys.readouterr()
    assert main(["clean", str(littered.folder)]) == 0
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines() if line.startswith("   ")]
    stays = f"({num_shared:,} bytes stay, as another run shares them)"
    assert ["17", f"rounds/1/checkpoint/{step.name}", stays] in lines
    assert ["0", "corpus/staging"] in lines
    before = used_bytes(littered.folder, made.folder)
    for run, is_last in ((littered, False), (made, True)):
        found = offered(run.folder, "checkpoints")
        assert len(found) == 2
        assert main(["clean", str(run.folder), "--only", "checkpoints", "--yes"]) == 0
        after = used_bytes(littered.folder, made.folder)
        assert before - after == sum(found.values())
        # The last name of a file frees it.
        assert (before - after > 17) == is_last
        before = after
        assert {row.state for row in read_status(made.folder)} == {"done"}


def test_what_an_unfinished_run_needs_is_not_offered(littered: Run) -> None:
    """The last complete round's checkpoint starts the next; parts and staging are resumed from."""
    littered.forget("train", 3)
    assert not any(
        name.startswith(("rounds/2/checkpoint/step", "rounds/3/checkpoint/step")) for name in offered(littered.folder)
    )
    littered.forget("score", 1)
    found = offered(littered.folder)
    assert not any("checkpoint/step" in name and "rounds/1" in name for name in found)
    assert "rounds/1/losses/parts" not in found
    (littered.folder / "corpus" / "manifest.json").unlink()
    assert "corpus/staging" not in offered(littered.folder)


def test_trials_keep_what_others_start_from(tmp_path: Path, texts: Path, fakes: FakeRanks) -> None:
    config = config_of(tmp_path, "mine", texts=texts)
    compare(config, rate_comparison("0.5"), 1, None, silent)
    open_run(config)
    folder = tmp_path / "mine-compare"
    # An arm of two rounds, from which one of three would start.
    shutil.copytree(folder / "rate-0.5-seed-0", folder / "rounds-2-seed-0")
    # A fork of an arm, which no comparison trains again.
    own = fork(read_run(folder / "rate-0.5-seed-0"), 2, [], "own", silent).run
    complete_all(own, steps_of(own.config), silent)
    assert is_done(own.folder)
    done = len(fakes.jobs)
    found = offered(config.folder, "trials")
    arm = "../mine-compare/rate-0.5-seed-0/rounds"
    assert {name.partition("/checkpoint")[0] for name in found} == {f"{arm}/1", f"{arm}/2"}
    assert offered(folder, "trials").keys() == {name.removeprefix("../mine-compare/") for name in found}
    before = used_bytes(folder)
    assert main(["clean", str(folder), "--yes"]) == 0
    # The first round's checkpoint is the base's, too.
    assert before - used_bytes(folder) == sum(found.values()) > 0
    compare(config, rate_comparison("0.5"), 1, None, silent)
    assert len(fakes.jobs) == done


def test_a_measured_generation_speed_needs_no_checkpoint(three_rounds: Run, fakes: FakeRanks) -> None:
    speed = generation_speed(three_rounds, 1, silent)
    assert main(["clean", str(three_rounds.folder), "--yes"]) == 0
    assert generation_speed(three_rounds, 1, silent) == speed


def test_runs_of_their_own_are_not_trials(littered: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder of runs is not one of trials: nothing of its runs is offered."""
    before = used_bytes(littered.folder)
    message = error_of(capsys, "clean", str(littered.folder.parent), "--yes")
    assert "not a run folder, nor one of trials (NAME-compare, NAME-ladder, NAME-sweep, NAME-grid)" in message
    assert used_bytes(littered.folder) == before


@pytest.mark.parametrize("part", ["rounds", "rounds/1", "rounds/1/checkpoint", "corpus"])
def test_what_is_behind_a_link_is_left_alone(littered: Run, tmp_path: Path, part: str) -> None:
    """It may be another run's, which needs it."""
    other = tmp_path / "other"
    shutil.move(littered.folder / part, other)
    (littered.folder / part).symlink_to(other)
    before = used_bytes(other)
    assert not any(name.startswith(f"{part}/") for name in offered(littered.folder))
    assert main(["clean", str(littered.folder), "--yes"]) == 0
    assert used_bytes(other) == before


def test_only_what_was_shown_is_deleted(littered: Run) -> None:
    """A run that has gone on since has more to delete, which nobody has agreed to."""
    record = littered.record_path("train", 3)
    content = record.read_bytes()
    record.unlink()
    offers = find_offers(littered.folder, [*clean.CATEGORIES])
    record.write_bytes(content)
    # The first round's checkpoint is gone by now.
    [gone] = littered.folder.glob("rounds/1/checkpoint/step-*")
    shutil.rmtree(gone)
    before = used_bytes(littered.folder)
    freed = clean.delete(littered.folder, offers)
    assert before - used_bytes(littered.folder) == freed > 0
    assert [*littered.folder.glob("rounds/2/checkpoint/step-*")]


@pytest.mark.parametrize("folder", [".", "link"])
def test_a_run_is_found_by_any_path(
    littered: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    found = offered(littered.folder)
    (tmp_path / "link").symlink_to(littered.folder)
    monkeypatch.chdir(littered.folder if folder == "." else tmp_path)
    assert offered(Path(folder)) == found


def test_a_cleaned_round_is_not_trained_over(three_rounds: Run) -> None:
    """Its records say what it was trained with, as its checkpoint did."""
    assert main(["clean", str(three_rounds.folder), "--yes"]) == 0
    # As if evaluation items that are removed from the corpus had changed.
    three_rounds.record("train", 1, "another", 0.0, [three_rounds.round_folder(1) / "steps.parquet"])
    before = used_bytes(three_rounds.folder / "rounds")
    with pytest.raises(ValueError, match=r"train.json: the round was trained with another .*, or delete .*train.json"):
        complete(three_rounds, "train", 1, silent)
    assert used_bytes(three_rounds.folder / "rounds") == before
    (three_rounds.corpus_folder / "manifest.json").unlink()
    for folder in three_rounds.folder.glob("rounds/*/checkpoint"):
        shutil.rmtree(folder)
    with pytest.raises(ValueError, match="missing, but rounds were trained on this corpus"):
        complete(three_rounds, "prepare", 0, silent)


def test_refusals_are_one_line(three_rounds: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(three_rounds.folder)
    assert "--only: 'caches' is not a category; choose from leftovers, checkpoints, trials" in error_of(
        capsys, "clean", folder, "--only", "trials,caches"
    )
    assert "not a run folder, nor" in error_of(capsys, "clean", str(three_rounds.folder / "corpus"))
    with locked(three_rounds.folder):
        assert "in use by a running process" in error_of(capsys, "clean", folder, "--yes")
    with (three_rounds.folder / ".ranks.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        assert "ranks of an earlier launch are still running" in error_of(capsys, "clean", folder, "--yes")
    assert read_run(three_rounds.folder).config == three_rounds.config


def test_a_terminal_is_asked(
    littered: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def answer(text: str) -> str:
        asked.append(text)
        return "n" if len(asked) == 1 else "y"

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    before = used_bytes(littered.folder)
    assert main(["clean", str(littered.folder), "--only", "leftovers"]) == 0
    assert used_bytes(littered.folder) == before
    assert main(["clean", str(littered.folder), "--only", "leftovers"]) == 0
    assert used_bytes(littered.folder) < before
    assert asked[0].startswith("delete this and free ")
