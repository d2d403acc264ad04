"""The end of a process: its status, its last words, and what is left out."""

import os
import subprocess
import sys

import pytest

CODE = """
import atexit, sys, threading, time
from data_scoring.base.exits import exit_with

class Module:
    def __del__(self):
        print("taken down")

kept = Module()

def main():
    atexit.register(print, "at exit")
    threading.Thread(target=lambda: (time.sleep(0.2), print("of a thread"))).start()
    {body}

exit_with(main)
"""


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        ("return 0", 0, ""),
        ("return None", 0, ""),
        ("return 3", 3, ""),
        ("sys.exit(2)", 2, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit('said')", 1, "said\n"),
        ("raise ValueError('wrong')", 1, "ValueError: wrong\n"),
    ],
)
def test_a_process_ends_as_usual_but_takes_nothing_down(body: str, status: int, error: str) -> None:
    command = [sys.executable, "-c", CODE.format(body=body)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    # Output to a pipe is buffered until the end.
    assert (done.returncode, done.stdout) == (status, "of a thread\nat exit\n")
    assert done.stderr.endswith(error)
    assert bool(done.stderr) == bool(error)


@pytest.mark.parametrize(
    ("redirection", "status"),
    [(">&-", 0), ("2>&-", 0), (">&- 2>&-", 0), (">/dev/full", 1), ("2>/dev/full", 0), ("| true", 1)],
)
def test_output_that_cannot_be_written_causes_no_traceback(redirection: str, status: int) -> None:
    code = "import time; from data_scoring.base.exits import exit_with; exit_with(lambda: time.sleep(0.3) or print(1))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = f"""set -o pipefail; {sys.executable} -c '{code}' {redirection}"""
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (status, "")
