"""`reprise watch` follows a run to its end, on a terminal of 80 columns and elsewhere."""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from data_scoring.base.progress import ProgressFile
from flows.cli.main import main
from flows.run.config import parse_config
from flows.run.folder import Run, open_run
from flows.run.locks import locked
from tests import ROOT
from tests.flows.fakes import values
from tests.flows.tracking.conftest import step_row
from trainer.records import STEPS, RowLog


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run that has begun."""
    return open_run(parse_config(values(tmp_path, tmp_path), "test"))


def record(run: Run, count: int) -> RowLog:
    """Record `count` steps of the first round, as training does."""
    folder = run.round_folder(1)
    folder.mkdir(parents=True)
    (run.folder / "logs").mkdir()
    log = RowLog(folder / "steps.parquet", STEPS, "f", 0)
    for step in range(1, count + 1):
        log.append(step_row(step, 5.0 - step / count))
    progress = ProgressFile(run.folder / "logs" / "progress.json")
    progress.details = {"samples": 2 * count, "loss": 4.0, "tokens_per_second": 1234.5}
    progress("training (steps)", count, 4 * count)
    return log


def test_a_run_that_is_not_running_is_shown(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(run.folder)]) == 0
    assert capsys.readouterr().out == (f"prepare: stopped\nstopped at prepare; `reprise run {run.folder}` resumes it\n")


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir, Path.touch], ids=["missing", "empty", "a file"])
def test_what_is_no_run_is_one_line(
    make: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "there")
    assert main(["watch", str(tmp_path / "there")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'there'}: not a run folder (it has no run.yaml); start one with `repr")


def test_lines_follow_a_run_to_its_end(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.cli.watch_command._SECONDS_BETWEEN_LINES", 0.0)
    watcher = threading.Thread(target=main, args=(["watch", str(run.folder)],))
    with locked(run.folder):
        record(run, 10)
        watcher.start()
        time.sleep(2.5)
        assert watcher.is_alive()
    watcher.join(20)
    assert not watcher.is_alive()
    first, *progress, last = capsys.readouterr().out.splitlines()
    assert first == "prepare: running"
    assert {line for line in progress if "training" in line} == {
        "training (steps): 10 of 40; samples 20; loss 4; tokens per second 1,234"
    }
    assert last == f"stopped at prepare; `reprise run {run.folder}` resumes it"


class Terminal:
    """A terminal of 80 columns in which a command runs."""

    def __init__(self, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "LANG": "C.UTF-8"}
        for name in ("COLUMNS", "LINES", "NO_COLOR"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli.main", *arguments],
            stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
        )  # fmt: skip
        os.close(slave)
        self.output = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                read = os.read(self._master, 65536)
            except OSError:
                return
            if not read:
                return
            self.output += read

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 60
        while text not in self.output.decode(errors="replace"):
            assert time.monotonic() < deadline, self.output
            time.sleep(0.1)

    def lines(self) -> list[str]:
        """Return the lines of all that was shown, without control sequences."""
        self._reader.join(10)
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.output.decode()).replace("\r", "").split("\n")


def test_a_terminal_of_80_columns_shows_stages_progress_and_the_curve(run: Run) -> None:
    with locked(run.folder):
        record(run, 50)
        terminal = Terminal("watch", str(run.folder))
        terminal.wait_for("training loss, round 1: 50 steps")
    assert terminal.process.wait(30) == 0
    lines = terminal.lines()
    # The last line, with a path, may be longer.
    assert max(len(line) for line in lines if not line.startswith("stopped at")) <= 80
    assert ["prepare", "running"] in [line.split() for line in lines]
    assert any(line.startswith("training (steps): 50 of 200") for line in lines)
    assert any(line.startswith("   4.98 ") and "BRAILLE" in unicodedata.name(line[8]) for line in lines)


def test_ctrl_c_ends_watching_and_not_the_run(run: Run) -> None:
    with locked(run.folder):
        record(run, 5)
        terminal = Terminal("watch", str(run.folder))
        terminal.wait_for("training loss")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.process.wait(30) == 0
    assert "Traceback" not in "\n".join(terminal.lines())
