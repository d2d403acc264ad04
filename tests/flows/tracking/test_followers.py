"""Following a run from another process: it ends with the run, however that ends, and a tracker holds up nothing."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.cli.main import main
from flows.run.config import parse_config
from flows.run.folder import Run, open_run
from flows.tracking.followers import followed, undelivered
from flows.tracking.sender import error_path
from tests import ROOT
from tests.flows.tracking.conftest import Rounds, step_row
from tests.flows.tracking.stores import read_mlflow, read_tensorboard


@pytest.fixture(autouse=True)
def python_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def tracked(rounds: Rounds, *trackers: Any) -> Run:
    """Return the run with these trackers, as `reprise run` opens it."""
    config = parse_config({**rounds.run.config.model_dump(mode="json"), "track": list(trackers)}, "test")
    return open_run(config)


def followers(folder: Path) -> list[psutil.Process]:
    """Return the processes that follow the run in a folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "flows.tracking.follower" in line and str(folder) in line and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def wait_until(is_true: Callable[[], object], seconds: float = 150.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_what_is_recorded_arrives_and_the_process_ends(rounds: Rounds) -> None:
    run = tracked(rounds, "tensorboard")
    logs = run.folder / "tracking" / "tensorboard"
    steps, _ = rounds.open(1, "f")
    with followed(run):
        steps.append(step_row(1, 5.0))
        wait_until(lambda: logs.is_dir() and "train/loss" in read_tensorboard(logs))
        steps.append(step_row(2, 4.0))
        steps.flush()
    wait_until(lambda: not followers(run.folder), 10)
    assert read_tensorboard(logs)["train/loss"] == [(1, 5.0), (2, 4.0)]
    assert undelivered(run) == []
    assert not list(run.folder.rglob("*.tmp"))


def test_a_run_without_trackers_starts_no_process(rounds: Rounds) -> None:
    with followed(rounds.run):
        assert followers(rounds.run.folder) == []
    assert not (rounds.run.folder / "tracking").exists()


WORK = """
import sys, time
from pathlib import Path
from flows.run.folder import read_run
from flows.tracking.followers import followed
with followed(read_run(Path(sys.argv[1]))):
    print(flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_it_ends_with_a_run_that_is_killed(rounds: Rounds, number: signal.Signals) -> None:
    run = tracked(rounds, "tensorboard")
    logs = run.folder / "tracking" / "tensorboard"
    process = subprocess.Popen(
        [sys.executable, "-c", WORK, str(run.folder)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    process.stdout.readline()
    wait_until((run.folder / "tracking" / "tensorboard.json").exists)
    [_] = followers(run.folder)
    steps, _ = rounds.open(1, "f")
    steps.append(step_row(1, 5.0))
    process.send_signal(number)
    process.wait()
    wait_until(lambda: not followers(run.folder), 15)
    assert read_tensorboard(logs)["train/loss"] == [(1, 5.0)]
    # The same command goes on.
    with followed(run):
        steps.append(step_row(2, 4.0))
    wait_until(lambda: not followers(run.folder), 15)
    assert read_tensorboard(logs)["train/loss"] == [(1, 5.0), (2, 4.0)]


def test_a_tracker_that_fails_holds_up_nothing(
    rounds: Rounds, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path / "a file"
    blocked.touch()
    run = tracked(rounds, {"name": "tensorboard", "uri": str(blocked)})
    steps, _ = rounds.open(1, "f")
    steps.append(step_row(1, 5.0))
    with followed(run):
        wait_until(error_path(run.folder, "tensorboard").exists)
        started = time.monotonic()
    assert time.monotonic() - started < 2
    [line] = undelivered(run)
    assert line.startswith("tensorboard did not receive everything (NotADirectoryError: ")
    wait_until(lambda: not followers(run.folder), 15)
    assert main(["track", str(run.folder)]) == 1
    assert capsys.readouterr().err.startswith("error: tensorboard is away (NotADirectoryError: ")
    # It is repaired.
    blocked.unlink()
    assert main(["track", str(run.folder)]) == 0
    assert capsys.readouterr().out == "tensorboard: 1 points sent\n"
    assert read_tensorboard(blocked / "x")["train/loss"] == [(1, 5.0)]
    assert undelivered(run) == []


@pytest.mark.parametrize("way", ["killed", "damaged record"])
@pytest.mark.parametrize("is_failed", [False, True])
def test_a_process_that_fails_is_told(rounds: Rounds, way: str, is_failed: bool) -> None:
    run = tracked(rounds, "tensorboard")
    record = run.folder / "tracking" / "tensorboard.json"
    if way == "damaged record":
        record.parent.mkdir()
        record.write_text("[]")
    with suppress(KeyError), followed(run):
        if way == "killed":
            wait_until(record.exists)
            followers(run.folder)[0].kill()
        wait_until(lambda: not followers(run.folder))
        # Its status may come a little later.
        time.sleep(0.5)
        if is_failed:
            raise KeyError
    [line] = undelivered(run)
    assert line == ("tensorboard did not receive everything (its process failed: see logs/track-tensorboard.log)")


@pytest.fixture
def silent_server() -> Iterator[int]:
    """The port of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("is_silent", [False, True], ids=["closed port", "never answers"])
def test_a_server_that_is_away_holds_up_nothing(
    rounds: Rounds, silent_server: int, is_silent: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    uri = f"http://127.0.0.1:{silent_server if is_silent else closed}"
    run = tracked(rounds, {"name": "mlflow", "uri": uri}, "tensorboard")
    steps, _ = rounds.open(1, "f")
    steps.append(step_row(1, 5.0))
    logs = run.folder / "tracking" / "tensorboard"
    with followed(run):
        wait_until(error_path(run.folder, "mlflow").exists)
        # The other tracker has its own process.
        wait_until(lambda: logs.is_dir() and "train/loss" in read_tensorboard(logs))
        started = time.monotonic()
    assert time.monotonic() - started < 10
    wait_until(lambda: not followers(run.folder), 90)
    assert len(undelivered(run)) == 1
    config = parse_config(
        {**run.config.model_dump(mode="json"), "track": [{"name": "mlflow", "uri": f"sqlite:///{tmp_path}/a.db"}]}, "t"
    )
    run = open_run(config)
    assert main(["track", str(run.folder)]) == 0
    assert read_mlflow(f"sqlite:///{tmp_path}/a.db")["train/loss"] == [(1, 5.0)]


def test_two_processes_do_not_send_the_same(rounds: Rounds, capsys: pytest.CaptureFixture[str]) -> None:
    run = tracked(rounds, "tensorboard")
    with followed(run):
        wait_until((run.folder / "tracking" / "tensorboard.json").exists)
        assert main(["track", str(run.folder)]) == 1
    error = f"error: {run.folder}: another process is sending it to tensorboard; wait until that has ended\n"
    assert capsys.readouterr().err == error


def test_a_run_that_names_no_tracker_has_to_be_told(rounds: Rounds, capsys: pytest.CaptureFixture[str]) -> None:
    folder = rounds.run.folder
    assert main(["track", str(folder)]) == 1
    assert capsys.readouterr().err == (
        f"error: {folder}: its field track names no tracker; give one, such as --to tensorboard\n"
    )
    assert main(["track", str(folder), "--to", "tensorboard"]) == 0
    assert capsys.readouterr().out == "tensorboard: had everything\n"


def test_a_missing_package_is_told_at_the_start(
    rounds: Rounds, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tracked(rounds, "wandb")
    monkeypatch.setattr("flows.run.trackers.find_spec", lambda name: None)
    for command in ("run", "prepare", "track"):
        assert main([command, str(run.folder)]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err == (
            "error: track: wandb is not installed; install it with `pip install 'reprise-lm[wandb]'`, or leave it out\n"
        )
