"""Multi-host jobs without a scheduler: one host leads, and others join it through the shared run folder.

The leader, which runs the flow, announces each attempt at a job in a file. `reprise join` watches that file, starts its
host's ranks, and writes a heartbeat file. A host without a heartbeat counts as lost.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from typing_extensions import TypedDict

from data_scoring.base.field_types import PathText
from data_scoring.base.files import writing
from data_scoring.base.validation import REPEAT, read_record, validated
from flows.launch import torchrun
from flows.launch.torchrun import Rendezvous
from flows.run.folder import read_run

_SECONDS_BETWEEN_BEATS = 2.0
_HEARTBEAT_TIMEOUT_SECONDS = 30.0


class _Attempt(TypedDict):
    id: str


class Announced(TypedDict):
    """The leader's announcement of an attempt at a job; `rendezvous` has the fields of `Rendezvous`."""

    job: PathText
    rendezvous: _Attempt


class Joined(TypedDict, total=False):
    """What a joined host writes; version 0.7 wrote other fields."""

    host: str
    rendezvous: str


def _announcement(run_folder: Path) -> Path:
    return run_folder / "logs" / "rendezvous.json"


class _Heartbeat:
    """A file whose changes show that its writer is running."""

    def __init__(self, path: Path, content: dict[str, object]) -> None:
        self._path, self._content = path, content
        self._count, self._last = 0, 0.0

    def beat(self) -> None:
        """Rewrite the file, if it is due."""
        now = time.monotonic()
        if self._count and now - self._last < _SECONDS_BETWEEN_BEATS:
            return
        self._last = now
        self._count += 1
        with writing(self._path) as temporary:
            temporary.write_text(json.dumps({**self._content, "beat": self._count}), encoding="utf-8")

    def end(self) -> None:
        """Delete the file."""
        self._path.unlink(missing_ok=True)


class _HeartbeatMonitor:
    """Measures how long heartbeats have been unchanged, by this host's clock only."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[object, float]] = {}

    def silence(self, path: Path, content: object) -> float:
        """Return for how many seconds the heartbeat in `path` has had this `content`."""
        known, since = self._known.get(path, (None, 0.0))
        if known != content:
            since = time.monotonic()
            self._known[path] = (content, since)
        return time.monotonic() - since


class Leader:
    """Announces an attempt at a job to the joining hosts, and monitors their heartbeats."""

    def __init__(self, run_folder: Path, job_path: Path, rendezvous: Rendezvous) -> None:
        self._folder = run_folder / "logs" / "nodes"
        self._rendezvous = rendezvous
        self._heartbeat = _Heartbeat(
            _announcement(run_folder), {"job": str(job_path), "rendezvous": asdict(rendezvous)}
        )
        self._monitor = _HeartbeatMonitor()

    def lost_host(self) -> str | None:
        """Renew the announcement, and return the name of a joined host without a heartbeat, or None."""
        self._heartbeat.beat()
        for path in self._folder.glob("*.json"):
            content = read_record(path, Joined)
            if content is None or content.get("rendezvous") != self._rendezvous.id:
                continue
            if self._monitor.silence(path, content) > _HEARTBEAT_TIMEOUT_SECONDS:
                path.unlink(missing_ok=True)
                return content.get("host", path.stem)
        return None

    def end(self) -> None:
        """Withdraw the announcement."""
        self._heartbeat.end()


def join(run_folder: Path, interface: str | None, is_done: Callable[[Path], bool]) -> None:
    """Start this host's ranks for every job of the run in `run_folder`, until `is_done(run_folder)`.

    Raises ValueError if there is no run, or if its launch configuration has no joining hosts.
    """
    run_folder = run_folder.absolute()
    launch = read_run(run_folder).config.launch
    if launch.nodes == 1 or not launch.launcher_kind.is_joined:
        raise ValueError(
            f"{run_folder}: launch.kind {launch.kind} with launch.nodes {launch.nodes} has no joining hosts; join a "
            "run of kind local with several nodes"
        )
    monitor = _HeartbeatMonitor()
    done = ""
    while not is_done(run_folder):
        content = read_record(_announcement(run_folder), Announced)
        if content is None or content["rendezvous"]["id"] == done:
            time.sleep(1)
        elif monitor.silence(_announcement(run_folder), content) > _HEARTBEAT_TIMEOUT_SECONDS:
            # The leader has ended; the next leader will announce another rendezvous.
            time.sleep(1)
        else:
            rendezvous = validated(Rendezvous, content["rendezvous"], _announcement(run_folder), REPEAT)
            print(f"joining {Path(content['job']).stem} at {rendezvous.endpoint}", file=sys.stderr, flush=True)
            _take_part(run_folder, Path(content["job"]), rendezvous, interface, monitor)
            done = rendezvous.id
    print("the run is done", file=sys.stderr)


def _take_part(
    run_folder: Path, job_path: Path, rendezvous: Rendezvous, interface: str | None, monitor: _HeartbeatMonitor
) -> None:
    """Run this host's ranks for one attempt, until it or its leader ends."""
    me = f"{platform.node()}-{os.getpid()}"
    heartbeat = _Heartbeat(
        run_folder / "logs" / "nodes" / f"{me}.json", {"host": platform.node(), "rendezvous": rendezvous.id}
    )
    log_path = run_folder / "logs" / f"{job_path.name.split('.')[0]}.{me}.log"
    with log_path.open("ab") as log:
        process = torchrun.start(job_path, rendezvous, is_head=False, interface=interface, log=log)
        try:
            while process.poll() is None and _is_on(run_folder, rendezvous, monitor):
                heartbeat.beat()
                time.sleep(0.2)
            if process.poll() is None:
                # The leader's torchrun ends first, and the announcement with it; this host's ranks may be about to end.
                process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            pass
        finally:
            torchrun.stop(process, rendezvous.seconds_to_stop)
            heartbeat.end()


def _is_on(run_folder: Path, rendezvous: Rendezvous, monitor: _HeartbeatMonitor) -> bool:
    path = _announcement(run_folder)
    content = read_record(path, Announced)
    if content is None or content["rendezvous"]["id"] != rendezvous.id:
        return False
    return monitor.silence(path, content) < _HEARTBEAT_TIMEOUT_SECONDS
