"""A folder as `make serve` finds it, with a server, a worker and ranks that are all real."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from tests import ROOT
from tests.conftest import make_documents
from trainer.checkpoint_folder import list_checkpoints

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

    def __init__(self, folder: Path, config: dict[str, Any] = CONFIG) -> None:
        self.folder = folder
        project = yaml.safe_load((ROOT / "prefect.yaml").read_text())
        project["deployments"][0]["parameters"]["config"] = {"name": "form", **config}
        (folder / "prefect.yaml").write_text(yaml.safe_dump(project))
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.api = f"http://127.0.0.1:{self.port}/api"
        lines = [json.dumps({"text": document}) for document in make_documents(600)]
        (folder / "a.jsonl").write_text("\n".join(lines))
        self.environment = {**os.environ, "PREFECT_HOME": str(folder / "prefect"), "PYTHONPATH": str(ROOT)}
        self.environment["PWD"] = str(folder)
        self.environment.pop("PREFECT_API_URL", None)
        self.server: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.folder / "serve.log").open("ab") as log:
            self.server = subprocess.Popen(
                [sys.executable, "-m", "flows.cli.main", "serve", "--port", str(self.port)],
                cwd=self.folder, env=self.environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        said = (self.folder / "serve.log").stat().st_size
        wait_for("serving", lambda: "Start a run" in (self.folder / "serve.log").read_text()[said:])

    def stop(self) -> None:
        assert self.server is not None
        # As Ctrl-C does, unless these tests were started in the background of a script, where nobody heeds it.
        is_heeded = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
        self.server.send_signal(signal.SIGINT if is_heeded else signal.SIGTERM)
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
            return "trainer.agent" in process.cmdline()
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            return True

    def submit(self, config: dict[str, Any], deployment: str = "multi-round/demo", **parameters: Any) -> str:
        return self.start_run(deployment, config=config, **parameters)

    def start_run(self, deployment: str, **parameters: Any) -> str:
        found = self.ask(f"deployments/name/{deployment}")
        wanted = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        return str(self.ask(f"deployments/{found['id']}/create_flow_run", wanted)["id"])

    def cancel(self, run: str) -> None:
        self.ask(f"flow_runs/{run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})

    def state(self, run: str) -> str:
        return str(self.ask(f"flow_runs/{run}")["state"]["name"])

    def message(self, run: str) -> str:
        return str(self.ask(f"flow_runs/{run}")["state"]["message"])

    def artifacts(self, run: str) -> list[dict[str, Any]]:
        return list(self.ask("artifacts/filter", {"flow_runs": {"id": {"any_": [run]}}}))

    def delete(self, path: str) -> None:
        httpx.delete(f"{self.api}/{path}", timeout=30).raise_for_status()

    def ask(self, path: str, content: Any = None) -> Any:
        """Return what the server answers to GET, or to POST of `content`; asked again, as clients do, where it is busy.

        Its SQLite refuses what it cannot lock, and the server then says 503.
        """
        for seconds in (0.5, 1, 2, 4, 8, 0):
            method = "GET" if content is None else "POST"
            answer = httpx.request(method, f"{self.api}/{path}", json=content, timeout=30)
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                break
            time.sleep(seconds)
        assert answer.is_success, answer.text
        return answer.json()

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
