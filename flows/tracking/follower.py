"""The process that follows a run and sends it to one tracker: `python -m flows.tracking.follower RUN_FOLDER NAME`.

It ends soon after the process that started it, whose end closes its standard input, however that ends.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from data_scoring.base.exits import exit_with
from flows.run.folder import read_run
from flows.tracking.sender import Sender, TrackerAwayError, note_error, sending

_SECONDS_BETWEEN_PASSES = 2.0
# Passes over long runs take seconds: most of the time, the processor is left to the ranks.
_LEAST_SHARE_OF_REST = 10
_LONGEST_PAUSE = 60.0
# A call that takes longer than this counts as a tracker that is away.
_PATIENCE_SECONDS = 15.0
# The time for what is left after the end of the run.
SECONDS_AFTER_RUN = 60.0


class _Watch:
    """Waits for the end of the starting process, and ends this one if a tracker then takes too long."""

    def __init__(self, folder: Path, name: str) -> None:
        self.is_over = threading.Event()
        self._parent = os.getppid()
        self._folder, self._name = folder, name
        self._started: float | None = None
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._watch, daemon=True).start()

    def timed(self, send: Callable[[bool], int], is_over: bool) -> None:
        """Call `send`; while it takes too long, the tracker counts as away."""
        self._started = time.monotonic()
        try:
            send(is_over)
        finally:
            self._started = None

    def _read(self) -> None:
        while sys.stdin.buffer.read(4096):
            pass
        self.is_over.set()

    def _watch(self) -> None:
        ended: float | None = None
        while True:
            time.sleep(0.5)
            now, started = time.monotonic(), self._started
            # Another process may have inherited the other end of standard input.
            if os.getppid() != self._parent:
                self.is_over.set()
            if started is not None and now - started > _PATIENCE_SECONDS:
                note_error(self._folder, self._name, f"no answer for {_PATIENCE_SECONDS:.0f} seconds")
            if self.is_over.is_set():
                ended = now if ended is None else ended
                if now - ended > SECONDS_AFTER_RUN:
                    note_error(self._folder, self._name, f"not done {SECONDS_AFTER_RUN:.0f} seconds after the run")
                    os._exit(1)


def follow(folder: Path, name: str) -> int:
    """Return the exit status: 0 once everything was sent after the end of the run, 1 if the tracker is away then."""
    watch = _Watch(folder, name)
    with sending(folder, name, lambda: not watch.is_over.is_set()) as is_alone:
        if not is_alone:
            return 1
        [settings] = [each for each in read_run(folder).config.track if each.name == name]
        return _send_all(folder, name, Sender(read_run(folder), settings), watch)


def _send_all(folder: Path, name: str, sender: Sender, watch: _Watch) -> int:
    pause = _SECONDS_BETWEEN_PASSES
    is_away = False
    while True:
        is_over, started = watch.is_over.is_set(), time.monotonic()
        try:
            watch.timed(sender.send, is_over)
            is_away, pause = False, _SECONDS_BETWEEN_PASSES
        except TrackerAwayError as error:
            print(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {name} is away: {error}", flush=True)
            note_error(folder, name, str(error))
            is_away, pause = True, min(2 * pause, _LONGEST_PAUSE)
        if is_over:
            return int(is_away)
        rest = max(pause, _LEAST_SHARE_OF_REST * (time.monotonic() - started))
        watch.is_over.wait(min(rest, _LONGEST_PAUSE))


def main() -> int:
    """Follow the run in the folder that the command line names."""
    os.nice(5)
    return follow(Path(sys.argv[1]), sys.argv[2])


if __name__ == "__main__":
    exit_with(main)
