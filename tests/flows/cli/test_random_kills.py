"""Processes killed at random moments of all stages: the same commands end with the results of an unbroken run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from flows.cli.main import main
from tests import ROOT
from tests.conftest import make_documents
from tests.evaluation_data import write_items
from tests.flows.equal_runs import assert_equal_runs

CONFIG: dict[str, Any] = {
    "device": "cpu",
    "corpus": {"sources": [{"name": "a", "path": "a.jsonl"}], "seq_length": 32, "num_shards": 6},
    "tokenizer": {"vocab_size": 300},
    "model": {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "ffn_hidden_size": 32},
    "train": {"global_batch_size": 4, "micro_batch_size": 2},
    "score": {"micro_batch_size": 1},
    "parallel": {"data": 2},
    "checkpoint": {"every_steps": 10},
}
COMMANDS = ("prepare", "train --round 1", "score --round 1", "refine --round 2", "train --round 2", "report")
# A command that does everything; ranks go from training to evaluation, calibration and scoring.
WHOLE = {
    **CONFIG,
    "corpus": {**CONFIG["corpus"], "seq_length": 256},
    "score": {"micro_batch_size": 1, "budget": "auto", "calibration_samples": 20, "min_correlation": 1.0},
    "eval": {"tasks": ["boolq", "piqa"], "data": "items"},
}
WAYS = {"commands": (COMMANDS, CONFIG), "run": (("run",), WHOLE)}
# The processes of a command have this time to end, including ranks that save.
SECONDS_TO_END = 60.0


class Folder:
    """A working folder in which commands are run, and killed."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder = folder
        (folder / "items").mkdir(parents=True)
        write_items(folder / "items")
        lines = [json.dumps({"text": document}) for document in make_documents(300)]
        (folder / "a.jsonl").write_text("\n".join(lines))
        (folder / "config.yaml").write_text(yaml.safe_dump({"name": "run", **config}))

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "run"

    def start(self, command: str) -> subprocess.Popen[bytes]:
        name, *options = command.split()
        target = "config.yaml" if name in ("prepare", "run") else str(self.run)
        return subprocess.Popen(
            [sys.executable, "-m", "flows.cli.main", name, target, *options],
            cwd=self.folder, env={**os.environ, "PYTHONPATH": str(ROOT), "PREFECT_HOME": str(self.folder / "prefect")},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.cwd() == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found


def kill_at_random(folder: Folder, process: subprocess.Popen[bytes], seconds: float, chance: random.Random) -> bool:
    """Return whether a command was hit: it, one of its processes or all of them, before it had ended."""
    try:
        process.wait(chance.uniform(0, seconds))
        return False
    except subprocess.TimeoutExpired:
        pass
    ours = folder.processes()
    chosen = {"command": [process.pid], "any": [chance.choice(ours).pid] if ours else [], "all": [p.pid for p in ours]}
    victims = chosen[chance.choice(["command", "any", "all"])]
    number = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    for victim in victims:
        try:
            os.kill(victim, number)
        except ProcessLookupError:
            continue
    return bool(victims)


def rows_of(run: Path, pattern: str) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of the files of a run, by their paths."""
    return {str(path.relative_to(run)): pq.read_table(path).to_pylist() for path in sorted(run.glob(pattern))}


@pytest.mark.slow
@pytest.mark.parametrize(("commands", "config"), WAYS.values(), ids=WAYS)
def test_killed_at_random_everything_ends_as_if_it_had_not_been(
    tmp_path: Path, pytestconfig: pytest.Config, commands: tuple[str, ...], config: dict[str, Any]
) -> None:
    """`--kills` processes are killed, in as many runs as that takes; no process and no temporary file remains."""
    wanted, chance, hits = pytestconfig.getoption("--kills"), random.Random(1), dict.fromkeys(commands, 0)
    unbroken, durations = Folder(tmp_path / "unbroken", config), {}
    for command in commands:
        started = time.monotonic()
        process = unbroken.start(command)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output.decode()
        durations[command] = time.monotonic() - started
    number = 0
    while sum(hits.values()) < wanted:
        number += 1
        folder = Folder(tmp_path / str(number), config)
        for command in commands:
            # Most of a run's kills are survived by going on, a few by going on after several.
            for _ in range(chance.choice([1, 2, 3])):
                process = folder.start(command)
                hits[command] += kill_at_random(folder, process, durations[command], chance)
                process.communicate(timeout=300)
            process = folder.start(command)
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output.decode()
            deadline = time.monotonic() + SECONDS_TO_END
            while orphans := folder.processes():
                assert time.monotonic() < deadline, [process.cmdline() for process in orphans]
                time.sleep(0.1)
        assert_equal_runs(folder.run, unbroken.run)
        for pattern in ("rounds/*/calibration.parquet", "rounds/*/evaluation/step-*/scores/*.parquet"):
            assert rows_of(folder.run, pattern) == rows_of(unbroken.run, pattern)
        assert main(["verify", str(folder.run)]) == 0
        assert [path for pattern in (".*.tmp*", ".*.reserved") for path in folder.run.rglob(pattern)] == []
    print(f"{sum(hits.values())} kills in {number} runs: {hits}")
