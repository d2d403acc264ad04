"""The end of a process: its status, its last words, and what is left out."""

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
