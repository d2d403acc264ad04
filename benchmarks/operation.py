"""Operating costs of a run: Prefect's overhead, the time to stop a cancelled run, and the steps that a kill loses."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.measure import spread
from data_scoring.base.files import read_json
from data_scoring.base.progress import silent
from flows.report.run_report import write_report
from flows.run.config import RunConfig
from flows.run.folder import open_run
from flows.run.locks import locked
from flows.stages.stage_order import complete_all, steps_of
from trainer.checkpoint_folder import list_checkpoints, read_checkpoint_record

TURNS = 3
EVERY_STEPS = 20
TINY: dict[str, Any] = {
    "corpus": {
        "sources": [{"name": "topics", "format": "python", "path": "topics", "max_documents": 20}], "seq_length": 32,
    },
    "tokenizer": {"vocab_size": 300},
    "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2},
    "train": {"global_batch_size": 4},
    "checkpoint": {"every_steps": EVERY_STEPS},
}  # fmt: skip

# Its training, of more than 9,000 steps, does not end before it has been stopped in every turn.
LONG: dict[str, Any] = {
    **TINY,
    "corpus": {"sources": [{"name": "docstrings", "format": "python", "path": "docstrings"}], "seq_length": 32},
    "name": "stopped",
}


def run_stages(config: RunConfig) -> Path:
    """Run all stages of the flow as plain function calls, and return the run's folder."""
    with locked(config.folder):
        run = open_run(config)
        complete_all(run, steps_of(config), silent)
        write_report(run)
    return run.folder


def prefect_overhead(folder: Path) -> list[dict[str, Any]]:
    """Return the seconds of a pipeline with nothing left to do, as a Prefect flow and as plain function calls."""
    config = RunConfig.model_validate({**TINY, "name": "noop", "output": str(folder)})
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
    # Use a temporary server, whatever is configured in the environment.
    os.environ["PREFECT_API_URL"] = ""
    from flows.orchestration.temporary_server import server
    from flows.pipeline import multi_round

    seconds: dict[str, list[float]] = {"plain": [], "prefect": []}
    with server():
        multi_round(config)
        for _ in range(TURNS):
            for name, work in (("plain", lambda: run_stages(config)), ("prefect", lambda: multi_round(config))):
                started = time.perf_counter()
                work()
                seconds[name].append(time.perf_counter() - started)
    return [
        spread("pipeline with nothing to do through Prefect / plain function calls", _ratios(seconds)),
        spread("seconds that Prefect adds to a pipeline of 8 tasks", _differences(seconds)),
    ]


def _ratios(seconds: dict[str, list[float]]) -> list[float]:
    return [mine / theirs for mine, theirs in zip(seconds["prefect"], seconds["plain"], strict=True)]


def _differences(seconds: dict[str, list[float]]) -> list[float]:
    return [mine - theirs for mine, theirs in zip(seconds["prefect"], seconds["plain"], strict=True)]


def stopping(folder: Path) -> list[dict[str, Any]]:
    """Return the seconds until ranks end after a cancel in Prefect and a kill of their flow, and the lost steps."""
    run = folder / LONG["name"]
    ends: dict[str, list[float]] = {"cancel": [], "kill": []}
    lost: dict[str, list[float]] = {"cancel": [], "kill": []}
    with _served(folder) as submit_and_cancel:
        submit, cancel = submit_and_cancel
        for _ in range(TURNS):
            for way in ("cancel", "kill"):
                flow_run = submit({**LONG, "output": str(folder)})
                before = _saved(run)
                _wait(lambda saved=before: _saved(run) > saved and _done(run) > _saved(run) + EVERY_STEPS // 2)
                started = time.monotonic()
                if way == "cancel":
                    cancel(flow_run)
                else:
                    _flow_process(run).kill()
                done = _done(run)
                _wait(lambda: _ranks_are_gone(run))
                ends[way].append(time.monotonic() - started)
                lost[way].append(max(0, done - _saved(run)))
                _wait(lambda: _lock_is_free(run / ".lock"))
    return [
        spread("seconds from a cancel in Prefect to the last rank's end (a checkpoint is saved)", ends["cancel"]),
        spread("seconds from a SIGKILL of the flow to the last rank's end", ends["kill"]),
        spread(f"steps lost by a cancel / steps between checkpoints ({EVERY_STEPS})", _shares(lost["cancel"])),
        spread(f"steps lost by a SIGKILL / steps between checkpoints ({EVERY_STEPS})", _shares(lost["kill"])),
    ]


def _shares(lost: list[float]) -> list[float]:
    return [steps / EVERY_STEPS for steps in lost]


@contextmanager
def _served(folder: Path) -> Iterator[tuple[Callable[[dict[str, Any]], str], Callable[[str], None]]]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    api = f"http://127.0.0.1:{port}/api"
    environment = {**os.environ, "PREFECT_HOME": str(folder / "prefect")}
    command = [sys.executable, "-m", "flows.cli.main", "serve", "--port", str(port), "--allow", str(folder)]
    log = folder / "serve.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    _wait(lambda: b"Start a run" in log.read_bytes())

    def submit(config: dict[str, Any]) -> str:
        deployment = httpx.get(f"{api}/deployments/name/multi-round/demo").json()["id"]
        answer = httpx.post(f"{api}/deployments/{deployment}/create_flow_run", json={"parameters": {"config": config}})
        return str(answer.raise_for_status().json()["id"])

    def cancel(run: str) -> None:
        state = {"state": {"type": "CANCELLING", "name": "Cancelling"}}
        httpx.post(f"{api}/flow_runs/{run}/set_state", json=state).raise_for_status()

    try:
        yield submit, cancel
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(90)


def _wait(condition: Callable[[], Any], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the condition was not met within {seconds} seconds")
        time.sleep(0.02)


def _saved(run: Path) -> int:
    found = list_checkpoints(run / "rounds" / "1" / "checkpoint")
    return int(read_checkpoint_record(found[-1])["step"]) if found else 0


def _done(run: Path) -> int:
    progress = read_json(run / "logs" / "progress.json")
    return int(progress["done"]) if progress and progress["what"].startswith("training") else 0


def _flow_process(run: Path) -> psutil.Process:
    holder = (run / ".lock").read_text()
    return psutil.Process(int(holder.split()[1]))


def _ranks_are_gone(run: Path) -> bool:
    return _lock_is_free(run / ".ranks.lock")


def _lock_is_free(path: Path) -> bool:
    with path.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
