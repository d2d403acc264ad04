"""The command `track`: sends a run to experiment trackers afterwards, or what its own processes could not send."""

import argparse
import time
from contextlib import ExitStack
from typing import Any

from flows.cli.options import path
from flows.run.folder import Run, read_run
from flows.run.locks import is_locked
from flows.run.trackers import TRACKER_KINDS, TrackerConfig, check_trackers

_SECONDS_BETWEEN_PASSES = 2.0


def add_track(commands: Any) -> None:
    """Add `track`."""
    track = commands.add_parser("track", help="send a run, finished or running, to experiment trackers")
    track.add_argument("run", type=path, metavar="RUN", help="run folder")
    track.add_argument(
        "--to",
        action="append",
        choices=[*TRACKER_KINDS],
        help="tracker (default: those of the run's field track); may be repeated",
    )
    track.set_defaults(command=_track)


def _track(options: argparse.Namespace) -> None:
    from flows.tracking.sender import Sender, TrackerAwayError, sending

    run = read_run(options.run)
    trackers = _trackers(run, options.to)
    with ExitStack() as stack:
        senders = {}
        for tracker in trackers:
            if not stack.enter_context(sending(run.folder, tracker.name, lambda: False)):
                raise ValueError(
                    f"{run.folder}: another process is sending it to {tracker.name}; wait until that has ended"
                )
            senders[tracker.name] = Sender(run, tracker)
        counts = dict.fromkeys(senders, 0)
        away: dict[str, TrackerAwayError] = {}
        is_over = False
        while not is_over and senders.keys() - away.keys():
            is_over = not is_locked(run.folder)
            for name in senders.keys() - away.keys():
                try:
                    counts[name] += senders[name].send(is_over)
                except TrackerAwayError as error:
                    away[name] = error
            if not is_over:
                time.sleep(_SECONDS_BETWEEN_PASSES)
    for name, count in counts.items():
        if name not in away:
            print(f"{name}: {count:,} points sent" if count else f"{name}: had everything")
    if away:
        reasons = "; ".join(f"{name} is away ({error})" for name, error in away.items())
        raise ValueError(f"{reasons}; run the same command again when it answers, what was sent is not sent again")


def _trackers(run: Run, names: list[str] | None) -> list[TrackerConfig]:
    """Return the settings of the named trackers, or else of those of the run."""
    configured = {tracker.name: tracker for tracker in run.config.track}
    chosen = [configured.get(name) or TrackerConfig(name=name) for name in dict.fromkeys(names or configured)]
    if not chosen:
        raise ValueError(f"{run.folder}: its field track names no tracker; give one, such as --to tensorboard")

    check_trackers(chosen)
    return chosen
