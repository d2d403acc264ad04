"""`reprise sql` without a query: at a terminal, and in a pipe."""

import io
import os
import pty
import select
import shutil
import sys
import time
from pathlib import Path

import pytest

from flows.cli.main import main

ROOT = Path(__file__).parents[3]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    golden = ROOT / "tests" / "flows" / "stages" / "golden" / "plain"
    return Path(shutil.copytree(golden, tmp_path / "plain"))


def read_until(terminal: int, text: str) -> str:
    """Return what the terminal shows, up to `text`."""
    shown, deadline = b"", time.monotonic() + 60
    while not shown.endswith(text.encode()) and time.monotonic() < deadline:
        if select.select([terminal], [], [], 1)[0]:
            shown += os.read(terminal, 4096)
    assert shown.endswith(text.encode()), shown
    return shown.decode()


def test_a_prompt_answers_one_query_after_the_other(run: Path) -> None:
    process, terminal = pty.fork()
    if process == 0:
        command = [sys.executable, "-m", "flows.cli.main", "sql", str(run)]
        os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"})
    assert "Ctrl-D ends" in read_until(terminal, "sql> ")
    os.write(terminal, b"select 41\n")
    read_until(terminal, "...> ")
    os.write(terminal, b"+ 1 as x;\n")
    assert "42" in read_until(terminal, "sql> ")
    os.write(terminal, b"from nowhere;\n")
    [line] = [line for line in read_until(terminal, "sql> ").splitlines() if line.startswith("error: ")]
    assert "Table with name nowhere does not exist" in line
    # What is dropped is no part of the next query. The arrow up brings an earlier line back.
    os.write(terminal, b"select nothing")
    read_until(terminal, "select nothing")
    # Python's prompt does not notice a Ctrl-C while it handles the key before.
    time.sleep(0.3)
    os.write(terminal, b"\x03")
    read_until(terminal, "sql> ")
    os.write(terminal, b"\x1b[A\x1b[A\x1b[A\n")
    read_until(terminal, "...> ")
    os.write(terminal, b"+ 2 as x;\n")
    assert "43" in read_until(terminal, "sql> ")
    os.write(terminal, b"\x04")
    assert os.waitpid(process, 0)[1] == 0
    os.close(terminal)


def test_piped_queries_are_answered_up_to_the_first_that_fails(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("select 40 + 2 as x;\n\n;\nselect 'a\nb' as y\n;\nselect 43 as z"))
    assert main(["sql", str(run)]) == 0
    out = capsys.readouterr().out
    assert [number in out for number in ("42", "43")] == [True, True]
    monkeypatch.setattr(sys, "stdin", io.StringIO("select 44 as x;\nfrom nowhere;\nselect 45;\n"))
    assert main(["sql", str(run)]) == 1
    out, err = capsys.readouterr()
    assert "44" in out and "45" not in out
    assert err.startswith("error: sql: ") and err.count("\n") == 1
