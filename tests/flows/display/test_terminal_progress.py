"""Progress on a terminal: numbers that can be read at any width, and none that were not reached."""

import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LONG = "training round 12 of 12 on 8 ranks · loss 4.3210 · validation 4.5678 · 123,456 tokens/s (steps)"


def shown_on_terminal(code: str, columns: int) -> list[str]:
    """Return the lines that `code` leaves on a terminal of so many columns."""
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, columns))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", "from flows.display.terminal_progress import TerminalProgress\n" + code],
        stdin=follower, stdout=follower, stderr=follower,
        env={**environment, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color"},
    )  # fmt: skip
    os.close(follower)
    written = b""
    while True:
        try:
            written += os.read(leader, 65_536)
        except OSError:
            # Linux' way to tell that the other side is closed.
            break
    process.wait()
    os.close(leader)
    return screen(written.decode(), columns)


def screen(written: str, columns: int) -> list[str]:
    """Return the lines of a terminal on which `written` was shown: text, line ends, and what rich uses to move up."""
    lines, row, column = [""], 0, 0
    for match in re.finditer(r"\x1b\[\??([\d;]*)([A-Za-z])|\r|\n|[^\x1b\r\n]", written):
        text, number, command = match[0], match[1], match[2]
        if command == "A":
            row = max(0, row - int(number or 1))
        elif command == "K":
            lines[row] = "" if number == "2" else lines[row][:column]
        elif text == "\r":
            column = 0
        elif text == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif command is None:
            if column == columns:
                row, column = row + 1, 0
                lines += [""] * (row + 1 - len(lines))
            lines[row] = lines[row].ljust(column)[:column] + text + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines if line.strip()]


@pytest.mark.parametrize("columns", [80, 100, 200])
@pytest.mark.parametrize(("done", "total"), [(15, 100), (12_345, 100_000)])
def test_numbers_are_whole_beside_a_long_description(columns: int, done: int, total: int) -> None:
    [line] = shown_on_terminal(
        f"""import time
with TerminalProgress() as progress:
    for done in ({done} - 2, {done} - 1, {done}):
        progress({LONG!r}, done, {total})
        time.sleep(0.15)
""",
        columns,
    )
    assert len(line) <= columns
    assert line.startswith("training round 12 of")
    assert re.search(rf" {done:,}/{total:,} +[\d,.]+/s +0:00:0\d +\d+:\d\d:\d\d$", line), line


@pytest.mark.parametrize("total", [100, None])
def test_work_that_is_interrupted_does_not_read_as_done(total: int | None) -> None:
    lines = shown_on_terminal(
        f"""
try:
    with TerminalProgress() as progress:
        progress("reading", 15, 20)
        progress("training (steps)", 15, {total})
        raise KeyboardInterrupt
except KeyboardInterrupt:
    print("stopped")
""",
        80,
    )
    assert [line.split()[0] for line in lines] == ["reading", "training", "stopped"]
    assert " 15/20 " in lines[0]
    assert "15/15" not in lines[1]
    assert re.search(r" 15/100 " if total else r" 15 ", lines[1]), lines[1]
