"""Runs as an operator has them: a real server, a real worker, real ranks, and everything that may be killed."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from flows.run.locks import is_locked
from tests.conftest import read_rows
from tests.evaluation_data import write_items
from tests.flows.orchestration.place import CONFIG, Place, wait_for
from trainer.checkpoint_folder import list_checkpoints

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def unbroken(place: Place) -> Path:
    """A run that nothing happened to, in the pieces that others are compared with."""
    run = place.submit({**CONFIG, "name": "unbroken"})
    place.wait(run, "Completed")
    return place.folder / "runs" / "unbroken"


def assert_equal_runs(run: Path, other: Path) -> None:
    for number in ("1", "2"):
        mix = Path("rounds") / number / "mix.parquet"
        assert (run / mix).read_bytes() == (other / mix).read_bytes()
        for file, columns in (("seen", ("step", "shard", "sample", "loss")), ("steps.parquet", ("step", "loss", "lr"))):
            mine, theirs = (read_rows(place / "rounds" / number / file, *columns) for place in (run, other))
            assert mine == theirs


def test_cancel_stops_every_rank_and_keeps_the_checkpoint(place: Place, unbroken: Path) -> None:
    run = place.submit({**CONFIG, "name": "cancelled"})
    folder = place.training("cancelled")
    assert len(place.ranks()) == 2
    started = time.monotonic()
    place.cancel(run)
    wait_for("the ranks' end", lambda: not place.ranks(), 30)
    print(f"cancel to the last rank's end: {time.monotonic() - started:.1f} s")
    # Set by the flow: the worker does so much later.
    place.wait(run, "Cancelled", 10)
    assert place.message(run).endswith("runs/cancelled can be resumed")
    print(f"cancel to the state Cancelled: {time.monotonic() - started:.1f} s")
    states = [state["name"] for state in place.ask(f"flow_run_states/?flow_run_id={run}")]
    assert states[states.index("Cancelling") + 1 :] == ["Cancelled"]
    assert list_checkpoints(folder / "rounds" / "1" / "checkpoint")
    wait_for("the lock", lambda: not is_locked(folder))
    place.wait(place.submit({**CONFIG, "name": "cancelled"}), "Completed")
    assert_equal_runs(folder, unbroken)


def test_a_killed_worker_neither_ends_a_run_nor_keeps_it_from_being_cancelled(place: Place) -> None:
    run = place.submit({**CONFIG, "name": "worker"})
    folder = place.training("worker")
    for worker in place.processes("prefect", "worker", "start"):
        worker.kill()
    time.sleep(5)
    assert place.state(run) == "Running"
    assert len(place.ranks()) == 2
    place.cancel(run)
    wait_for("the ranks' end", lambda: not place.ranks(), 30)
    place.wait(run, "Cancelled", 60)
    assert list_checkpoints(folder / "rounds" / "1" / "checkpoint")


@pytest.mark.parametrize("victim", ["flow", "rank"])
def test_a_killed_process_fails_the_run_which_then_goes_on(place: Place, unbroken: Path, victim: str) -> None:
    run = place.submit({**CONFIG, "name": victim, "launch": {"max_restarts": 0}})
    folder = place.training(victim)
    [victim_process, *_] = place.ranks() if victim == "rank" else [torchrun(place).parent()]
    assert victim_process is not None
    victim_process.kill()
    wait_for("the ranks' end", lambda: not place.ranks(), 30)
    place.wait(run, "Failed" if victim == "rank" else "Crashed", 180)
    if victim == "rank":
        assert "rank 0 was killed by SIGKILL (out of memory?)" in place.message(run)
    place.wait(place.submit({**CONFIG, "name": victim}), "Completed")
    assert_equal_runs(folder, unbroken)


def torchrun(place: Place) -> psutil.Process:
    [found] = place.processes("trainer.agent")
    return found


def test_a_server_that_is_away_for_minutes_ends_nothing(place: Place, unbroken: Path) -> None:
    run = place.submit({**CONFIG, "name": "away"})
    folder = place.training("away")
    assert place.server is not None
    place.server.send_signal(signal.SIGSTOP)
    for server in place.processes("prefect_server"):
        server.kill()
    time.sleep(180)
    assert place.processes("flow_run") or is_locked(folder) or (folder / "report.html").exists()
    place.server.send_signal(signal.SIGCONT)
    wait_for("the server", lambda: is_up(place))
    place.wait(run, "Completed", 300)
    assert_equal_runs(folder, unbroken)
    assert_shown_after_absence(place, run)


def is_up(place: Place) -> bool:
    try:
        return httpx.get(f"{place.api}/health", timeout=5).is_success
    except httpx.HTTPError:
        return False


def assert_shown_after_absence(place: Place, run: str) -> None:
    keys = {artifact["key"] for artifact in place.artifacts(run)}
    assert {"away-round-1-losses", "away-round-2-selection", "away-round-2-report"} <= keys


def test_when_everything_is_killed_at_once_no_run_stays_running(place: Place, unbroken: Path) -> None:
    run = place.submit({**CONFIG, "name": "reboot"})
    folder = place.training("reboot")
    assert place.server is not None
    place.server.kill()
    for process in place.processes():
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    place.server.wait()
    wait_for("everything's end", lambda: not place.processes(), 30)
    place.start()
    place.wait(run, "Crashed", 30)
    place.wait(place.submit({**CONFIG, "name": "reboot"}), "Completed")
    assert_equal_runs(folder, unbroken)


def test_approval_is_asked_for_and_taken(place: Place) -> None:
    run = place.submit({**CONFIG, "name": "gated", "rounds": {"num_rounds": 2, "approval": True}})
    place.wait(run, "Suspended")
    folder = place.folder / "runs" / "gated"
    wait_for("the flow's end", lambda: not is_locked(folder))
    description = str(place.ask(f"flow_runs/{run}/input/{keyset(place, run)}-description"))
    assert "Approve this selection for round 2?" in description
    answer = place.ask(f"flow_runs/{run}/resume", {"run_input": {"policy": "random", "sampling_rate": 0.25}})
    assert answer["status"] == "ACCEPT", answer
    place.wait(run, "Completed")
    kept = read_rows(folder / "rounds" / "2" / "selection", "kept", "reason")
    assert sum(row[0] for row in kept) == pytest.approx(len(kept) / 4, abs=8)
    assert {row[1] for row in kept if row[0]} == {"drawn at random"}
    assert json.loads((folder / "rounds" / "2" / "approval.json").read_text())["sampling_rate"] == 0.25


def keyset(place: Place, run: str) -> str:
    details = place.ask(f"flow_runs/{run}")["state"]["state_details"]
    return str(details["run_input_keyset"]["description"]).removesuffix("-description")


def test_the_commands_of_the_readme(place: Place, unbroken: Path) -> None:
    shutil.copytree(unbroken, place.folder / "runs" / "copy", dirs_exist_ok=True)
    environment = {**place.environment, "PREFECT_API_URL": place.api}
    # Short enough for a model of 32 tokens.
    items = [{"goal": "a", "sol1": "b", "sol2": "a b c"}, {"goal": "b", "sol1": "a", "sol2": "c"}]
    write_items(place.folder / "items", {"piqa.jsonl": items})
    asked = json.dumps({"tasks": ["piqa"], "data": "items"})
    for arguments in (
        ["deploy", "--all"],
        ["deployment", "run", "score-shards/score-shards", "-p", "run_folder=runs/copy", "--watch"],
        [
            "deployment",
            "run",
            "evaluate/evaluate",
            "-p",
            "run_folder=runs/copy",
            "-p",
            f"evaluation={asked}",
            "--watch",
        ],
        ["deployment", "run", "refine/refine", "-p", "run_folder=runs/copy", "--watch"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "prefect", *arguments],
            cwd=place.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    [artifact] = place.ask("artifacts/filter", {"artifacts": {"key": {"any_": ["evaluation-round-1"]}}})
    assert "| model | Reasoning: PIQA |" in artifact["data"]
    assert "copy, round 1 |" in artifact["data"]
