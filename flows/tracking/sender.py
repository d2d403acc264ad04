"""Sending a run to one tracker, with a record of how far it got in the run folder."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import yaml
from typing_extensions import TypedDict

from data_scoring.base.files import checksum, fingerprint, remove_leftovers, write_record, writing
from data_scoring.base.messages import one_line
from data_scoring.base.validation import read_record
from flows.run.config import flatten
from flows.run.folder import Run
from flows.run.trackers import TrackerConfig, without_password
from flows.tracking.recorded_points import RoundCursor, Unsent
from flows.tracking.tracker import Tracker, tracker_class

_MOST_POINTS = 1000


class _Record(TypedDict):
    """What was sent to a tracker: `target` is where, `config` and `report` identify what they held."""

    target: str
    memory: dict[str, Any]
    config: str
    report: str
    rounds: dict[str, RoundCursor]


class TrackerAwayError(Exception):
    """A tracker could not be reached, or failed; what was not sent can be sent later."""


class Sender:
    """Sends what a run has recorded to one tracker. What a killed process had sent is not sent again."""

    def __init__(self, run: Run, settings: TrackerConfig) -> None:
        self._run, self._name = run, settings.name
        kind = tracker_class(settings.name)
        self._settings = kind.located(settings)
        self._kind = kind
        self._path = record_path(run.folder, settings.name)
        self._record = self._read()
        self._unsent = Unsent(run, self._record["rounds"])
        self._tracker: Tracker | None = None

    def send(self, is_over: bool) -> int:
        """Send everything that is new, with the report if `is_over`; return the number of points.

        Raises TrackerAwayError if the tracker is away.
        """
        try:
            count = self._send(is_over)
        except Exception as error:  # whatever a tracker's package raises
            self._forget_tracker()
            raise TrackerAwayError(f"{type(error).__name__}: {without_password(one_line(error))}") from error
        error_path(self._run.folder, self._name).unlink(missing_ok=True)
        return count

    def _send(self, is_over: bool) -> int:
        tracker = self._opened()
        self._send_config(tracker)
        count = 0
        for points, rounds in self._unsent.batches():
            sent = 0
            while sent < len(points):
                part = points[sent : sent + _MOST_POINTS]
                tracker.send(part)
                sent += len(part)
            self._note(rounds=rounds)
            self._unsent.sent(rounds)
            count += len(points)
        if is_over:
            self._send_report(tracker)
            last = self._run.config.rounds.num_rounds
            tracker.close(is_done=self._run.recorded("train", last) is not None)
            self._tracker = None
            self._note()
        return count

    def _opened(self) -> Tracker:
        if self._tracker is None:
            folder = self._path.parent / self._name
            memory = self._record["memory"]
            self._tracker = self._kind(self._settings, self._run.folder.name, folder, memory)
            self._note()
        return self._tracker

    def _send_config(self, tracker: Tracker) -> None:
        config = self._run.config.model_dump(mode="json")
        identity = fingerprint(config)
        if identity != self._record["config"]:
            text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
            tracker.configure({name: value for name, value in flatten(config).items() if name}, text)
            self._note(config=identity)

    def _send_report(self, tracker: Tracker) -> None:
        page = self._run.folder / "report.html"
        if page.exists() and (identity := checksum(page)) != self._record["report"]:
            tracker.show_report(page, sorted((self._run.folder / "report").glob("*.png")))
            self._note(report=identity)

    def _forget_tracker(self) -> None:
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            with suppress(Exception):
                tracker.close(is_done=False)
        self._record = self._read()
        self._unsent = Unsent(self._run, self._record["rounds"])

    def _read(self) -> _Record:
        # A copy of a run folder, with its records, is another run where both are sent.
        name = [] if self._settings.uri is None else [self._run.folder.name]
        target = fingerprint(self._settings.model_dump(mode="json"), *name)
        found = read_record(self._path, _Record, "delete it to send the run once more")
        if found is not None and found["target"] == target:
            return found
        return {"target": target, "memory": {}, "config": "", "report": "", "rounds": {}}

    def _note(self, **changed: Any) -> None:
        """Record what was sent, on disk."""
        self._record = cast(_Record, {**self._record, **changed})
        write_record(self._path, self._record)


def record_path(folder: Path, name: str) -> Path:
    """Return the path of the record of what was sent to a tracker."""
    return folder / "tracking" / f"{name}.json"


def error_path(folder: Path, name: str) -> Path:
    """Return the path of the text that says why a tracker is away; it exists only while it is."""
    return folder / "tracking" / f"{name}.error"


def note_error(folder: Path, name: str, reason: str) -> None:
    """Write down why a tracker is away, unless the disk is full: then nothing can say so."""
    with suppress(OSError), writing(error_path(folder, name)) as temporary:
        temporary.write_text(reason, encoding="utf-8")


@contextmanager
def sending(folder: Path, name: str, keep_waiting: Callable[[], bool]) -> Iterator[bool]:
    """Yield whether this is the only process that sends the run to the tracker, once it is, or no longer waits."""
    path = folder / "tracking" / f".{name}.lock"
    path.parent.mkdir(exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_alone = True
                # Of a process that was killed.
                remove_leftovers(path.parent, name)
                break
            except BlockingIOError:
                if not keep_waiting():
                    is_alone = False
                    break
                time.sleep(0.2)
        yield is_alone
    finally:
        os.close(descriptor)
