"""Starting the processes that send a run to its trackers, and ending them."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from flows.run.folder import Run
from flows.run.trackers import check_trackers
from flows.tracking.sender import error_path, note_error

# After a run that has ended well, trackers that answer get this time to receive the rest.
_SECONDS_TO_WAIT = 15.0


@contextmanager
def followed(run: Run) -> Iterator[None]:
    """Have the trackers of a run, if any, follow it; they get the rest, and end, soon after the context.

    Raises ValueError if the package of a tracker is not installed.
    """
    check_trackers(run.config.track)
    followers = {tracker.name: _start(run, tracker.name) for tracker in run.config.track}
    try:
        yield
    except BaseException:
        _tell_end(followers)
        _note_failed(run, followers)
        raise
    _tell_end(followers)
    deadline = time.monotonic() + _SECONDS_TO_WAIT
    for name, follower in followers.items():
        while follower.poll() is None and time.monotonic() < deadline and not error_path(run.folder, name).exists():
            time.sleep(0.1)
    _note_failed(run, followers)
    _note_slow(run, followers)


def _note_failed(run: Run, followers: dict[str, subprocess.Popen[bytes]]) -> None:
    """Write down which processes have failed, if they could not do so themselves."""
    for name, follower in followers.items():
        if follower.poll() not in (None, 0) and not error_path(run.folder, name).exists():
            note_error(run.folder, name, f"its process failed: see logs/track-{name}.log")


def _note_slow(run: Run, followers: dict[str, subprocess.Popen[bytes]]) -> None:
    """Write down which processes have not ended yet; they delete it once everything is sent."""
    for name, follower in followers.items():
        if follower.poll() is None and not error_path(run.folder, name).exists():
            note_error(run.folder, name, "its process is still sending")
            if follower.poll() == 0:
                error_path(run.folder, name).unlink(missing_ok=True)


def undelivered(run: Run) -> list[str]:
    """Return a line for each tracker of a run that did not get everything, as far as is known."""
    found = []
    for tracker in run.config.track:
        path = error_path(run.folder, tracker.name)
        if path.exists():
            found.append(f"{tracker.name} did not receive everything ({path.read_text(encoding='utf-8')})")
    return found


def _start(run: Run, name: str) -> subprocess.Popen[bytes]:
    error_path(run.folder, name).unlink(missing_ok=True)
    logs = run.folder / "logs"
    logs.mkdir(exist_ok=True)
    with (logs / f"track-{name}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "flows.tracking.follower", str(run.folder), name],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=dict(os.environ),
            # Ctrl-C does not reach it: it still sends the rest.
            start_new_session=True,
        )


def _tell_end(followers: dict[str, subprocess.Popen[bytes]]) -> None:
    for follower in followers.values():
        assert follower.stdin is not None
        follower.stdin.close()
