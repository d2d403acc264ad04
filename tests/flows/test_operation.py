"""Runs as an operator has them: a real server, a real worker, real ranks, and everything that may be killed."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from flows.run_folder import is_locked
from tests.conftest import make_documents, read_rows
from trainer.checkpoint_folder import list_checkpoints

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CONFIG: dict[str, Any] = {
    "corpus": {"sources": [{"name": "a", "path": "a.jsonl"}], "seq_length": 32, "num_shards": 8},
    "tokenizer": {"vocab_size": 300},
    "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "ffn_hidden_size": 64},
    "train": {"global_batch_size": 4, "micro_batch_size": 2, "lr": 1.0e-2},
    "score": {"micro_batch_size": 1},
    "parallel": {"data": 2},
    "checkpoint": {"every_steps": 50},
}


def wait_for(what: str, is_so: Callable[[], Any], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (answer := is_so()):
        assert time.monotonic() < deadline, f"waited {seconds} s for: {what}"
        time.sleep(0.1)
    return answer


class Place:
    """A folder as `make serve` finds it, served on ports of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("flows", "data_scoring", "trainer", "kernels", "prefect.yaml"):
            (folder / name).symlink_to(ROOT / name)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.api = f"http://127.0.0.1:{self.port}/api"
        lines = [json.dumps({"text": document}) for document in make_documents(600)]
        (folder / "a.jsonl").write_text("\n".join(lines))
        self.environment = {**os.environ, "PREFECT_HOME": str(folder / "prefect"), "PYTHONPATH": str(ROOT)}
        self.environment.pop("PREFECT_API_URL", None)
        self.server: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.folder / "serve.log").open("ab") as log:
            self.server = subprocess.Popen(
                [sys.executable, "-m", "flows.cli", "serve", "--port", str(self.port)],
                cwd=self.folder, env=self.environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        said = (self.folder / "serve.log").stat().st_size
        wait_for("serving", lambda: "Start a run" in (self.folder / "serve.log").read_text()[said:])

    def stop(self) -> None:
        assert self.server is not None
        self.server.send_signal(signal.SIGINT)
        self.server.wait(90)

    def processes(self, *words: str) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                line, place = " ".join(process.cmdline()), process.cwd()
            except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
                continue
            is_ours = str(self.folder) in line or place == str(self.folder)
            if is_ours and all(word in line for word in words):
                found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        return [process for process in self.processes("-m trainer.worker") if not self.is_torchrun(process)]

    @staticmethod
    def is_torchrun(process: psutil.Process) -> bool:
        try:
            return "torch.distributed.run" in process.cmdline()
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            return True

    def submit(self, config: dict[str, Any], deployment: str = "multi-round/demo") -> str:
        found = httpx.get(f"{self.api}/deployments/name/{deployment}").raise_for_status().json()
        answer = httpx.post(
            f"{self.api}/deployments/{found['id']}/create_flow_run",
            json={"parameters": {"config": config}, "state": {"type": "SCHEDULED"}},
            timeout=30,
        )
        assert answer.is_success, answer.text
        return str(answer.json()["id"])

    def state(self, run: str) -> str:
        return str(httpx.get(f"{self.api}/flow_runs/{run}", timeout=30).json()["state"]["name"])

    def message(self, run: str) -> str:
        return str(httpx.get(f"{self.api}/flow_runs/{run}", timeout=30).json()["state"]["message"])

    def wait(self, run: str, state: str, seconds: float = 240) -> None:
        ended = ("Completed", "Failed", "Crashed", "Cancelled")

        def is_there() -> bool:
            now = self.state(run)
            assert now == state or now not in ended, f"{now}: {self.message(run)}"
            return now == state

        wait_for(f"state {state}", is_there, seconds)

    def training(self, name: str) -> Path:
        """Wait until the first round of the run has a checkpoint, and return the run's folder."""
        run = self.folder / "runs" / name
        wait_for("a checkpoint", lambda: list_checkpoints(run / "rounds" / "1" / "checkpoint"))
        return run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("place"))
    place.start()
    yield place
    place.stop()
    left = [" ".join(process.cmdline()) for process in place.processes()]
    assert left == []


@pytest.fixture(scope="module")
def unbroken(place: Place) -> Path:
    """A run that nothing happened to, in the pieces that others are compared with."""
    run = place.submit({**CONFIG, "name": "unbroken"})
    place.wait(run, "Completed")
    assert_shown(place, run, "unbroken")
    return place.folder / "runs" / "unbroken"


def assert_shown(place: Place, run: str, name: str) -> None:
    filters = {"flow_runs": {"id": {"any_": [run]}}}
    artifacts = httpx.post(f"{place.api}/artifacts/filter", json=filters).json()
    shown = {artifact["key"]: artifact for artifact in artifacts}
    for key in ("round-1-training", "round-1-losses", "round-2-selection", "round-2-training", "round-2-report"):
        assert f"{name}-{key}" in shown
    assert shown[f"{name}-train-1"]["data"] == 100
    assert "training (steps)" in shown[f"{name}-train-1"]["description"]
    assert len(json.loads(shown[f"{name}-round-1-losses"]["data"])) == 8
    assert "data:image/png;base64," in shown[f"{name}-round-2-selection"]["data"]
    link = shown[f"{name}-round-2-report"]["data"].split("(")[1].split(")")[0]
    assert "<title>Reprise: unbroken" in httpx.get(link).text
    tasks = httpx.post(f"{place.api}/task_runs/count", json=filters).json()
    assert 7 <= tasks <= 12
    events = httpx.post(
        f"{place.api}/events/filter",
        json={"filter": {"event": {"prefix": ["reprise."]}, "occurred": {"since": "2020-01-01T00:00:00Z"}}},
    ).json()["events"]
    assert {event["event"] for event in events} >= {
        "reprise.score.completed", "reprise.refine.completed", "reprise.round.completed"
    }  # fmt: skip


def assert_equal_runs(run: Path, other: Path) -> None:
    for number in ("1", "2"):
        mix = Path("rounds") / number / "mix.parquet"
        assert (run / mix).read_bytes() == (other / mix).read_bytes()
        for file, columns in (("seen", ("step", "shard", "sample", "loss")), ("steps.parquet", ("step", "loss", "lr"))):
            mine, theirs = (read_rows(place / "rounds" / number / file, *columns) for place in (run, other))
            assert mine == theirs


def test_what_is_shown(unbroken: Path) -> None:
    assert (unbroken / "report.html").exists()


def test_bad_values_are_refused_at_submission(place: Place) -> None:
    with pytest.raises(AssertionError, match="7 is greater than the maximum of 1"):
        place.submit({**CONFIG, "refine": {"sampling_rate": 7}})
    with pytest.raises(AssertionError, match=r"'hardest' is not one of \[.*'loss', 'random', 'all'"):
        place.submit({**CONFIG, "refine": {"policy": "hardest"}})


def test_paths_do_not_escape(place: Place) -> None:
    run = place.submit({**CONFIG, "name": "escape", "output": "../elsewhere"})
    place.wait(run, "Failed")
    assert "output: '../elsewhere' lies outside of what flows may use here" in place.message(run)
    assert not (place.folder.parent / "elsewhere").exists()


def test_cancel_stops_every_rank_and_keeps_the_checkpoint(place: Place, unbroken: Path) -> None:
    run = place.submit({**CONFIG, "name": "cancelled"})
    folder = place.training("cancelled")
    assert len(place.ranks()) == 2
    started = time.monotonic()
    cancel(place, run)
    wait_for("the ranks' end", lambda: not place.ranks(), 30)
    print(f"cancel to the last rank's end: {time.monotonic() - started:.1f} s")
    place.wait(run, "Cancelled", 60)
    assert list_checkpoints(folder / "rounds" / "1" / "checkpoint")
    wait_for("the lock", lambda: not is_locked(folder))
    place.wait(place.submit({**CONFIG, "name": "cancelled"}), "Completed")
    assert_equal_runs(folder, unbroken)


def cancel(place: Place, run: str) -> None:
    state = {"state": {"type": "CANCELLING", "name": "Cancelling"}}
    httpx.post(f"{place.api}/flow_runs/{run}/set_state", json=state, timeout=30).raise_for_status()


def test_a_killed_worker_neither_ends_a_run_nor_keeps_it_from_being_cancelled(place: Place) -> None:
    run = place.submit({**CONFIG, "name": "worker"})
    folder = place.training("worker")
    for worker in place.processes("prefect", "worker", "start"):
        worker.kill()
    time.sleep(5)
    assert place.state(run) == "Running"
    assert len(place.ranks()) == 2
    cancel(place, run)
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
    [found] = place.processes("torch.distributed.run")
    return found


def test_a_server_that_is_away_for_minutes_ends_nothing(place: Place, unbroken: Path) -> None:
    run = place.submit({**CONFIG, "name": "away"})
    folder = place.training("away")
    assert place.server is not None
    place.server.send_signal(signal.SIGSTOP)
    for server in place.processes("prefect", "server", "start"):
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
    filters = {"flow_runs": {"id": {"any_": [run]}}}
    keys = {artifact["key"] for artifact in httpx.post(f"{place.api}/artifacts/filter", json=filters).json()}
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
    assert place.state(run) == "Running"
    place.wait(run, "Crashed", 180)
    place.wait(place.submit({**CONFIG, "name": "reboot"}), "Completed")
    assert_equal_runs(folder, unbroken)


def test_approval_is_asked_for_and_taken(place: Place) -> None:
    run = place.submit({**CONFIG, "name": "gated", "rounds": {"num_rounds": 2, "approval": True}})
    place.wait(run, "Suspended")
    folder = place.folder / "runs" / "gated"
    wait_for("the flow's end", lambda: not is_locked(folder))
    description = str(httpx.get(f"{place.api}/flow_runs/{run}/input/{keyset(place, run)}-description").json())
    assert "May round 2 train on this?" in description
    answer = httpx.post(
        f"{place.api}/flow_runs/{run}/resume", json={"run_input": {"policy": "random", "sampling_rate": 0.25}}
    )
    assert answer.json()["status"] == "ACCEPT", answer.text
    place.wait(run, "Completed")
    kept = read_rows(folder / "rounds" / "2" / "selection", "kept", "reason")
    assert sum(row[0] for row in kept) == pytest.approx(len(kept) / 4, abs=8)
    assert {row[1] for row in kept if row[0]} == {"drawn at random"}
    assert json.loads((folder / "rounds" / "2" / "approval.json").read_text())["sampling_rate"] == 0.25


def keyset(place: Place, run: str) -> str:
    details = httpx.get(f"{place.api}/flow_runs/{run}").json()["state"]["state_details"]
    return str(details["run_input_keyset"]["description"]).removesuffix("-description")


def test_the_commands_of_the_readme(place: Place, unbroken: Path) -> None:
    shutil.copytree(unbroken, place.folder / "runs" / "copy", dirs_exist_ok=True)
    environment = {**place.environment, "PREFECT_API_URL": place.api}
    for arguments in (
        ["deploy", "--all"],
        ["deployment", "run", "score-shards/score-shards", "-p", "run_folder=runs/copy", "--watch"],
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
