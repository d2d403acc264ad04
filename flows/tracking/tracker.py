"""The interface of an experiment tracker. To add one, see `flows.run.trackers`."""

import os
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from flows.run.trackers import TRACKER_KINDS, TrackerConfig


@dataclass(frozen=True)
class Point:
    """Values at a step of the run, which counts on over all rounds.

    key: identifies the point among all of the run. time: when they were measured, in seconds since the epoch; the same
    whenever the point is read.
    """

    key: str
    step: int
    time: float
    values: dict[str, float]


class Tracker(ABC):
    """Sends one run to a tracker. What a method has sent must not be lost if this process is killed afterwards.

    Any exception means that the tracker is away: what was to be sent is sent again later, by a new object.

    variable: the environment variable that says where to send, where the configuration does not.
    """

    variable: ClassVar[str]

    def __init__(self, settings: TrackerConfig, run_name: str, folder: Path, memory: dict[str, Any]) -> None:
        """Open the tracker, or connect to it.

        settings: as `located` returns them. folder: where it may write files. memory: what later objects get, as JSON;
        written to disk after each method.
        """
        self.settings, self.run_name, self.folder, self.memory = settings, run_name, folder, memory

    @abstractmethod
    def configure(self, fields: dict[str, Any], text: str) -> None:
        """Send the configuration: its fields by their dotted names, and as YAML; again after a change."""

    @abstractmethod
    def send(self, points: Sequence[Point]) -> None:
        """Send points. A point may come twice if a process was killed just before its delivery was recorded."""

    def show_report(self, page: Path, pictures: Sequence[Path]) -> None:  # noqa: B027 - not all trackers can
        """Send the report, a page and PNG pictures, where the tracker can hold it; again after a change."""

    @classmethod
    def located(cls, settings: TrackerConfig) -> TrackerConfig:
        """Return `settings` with what the environment says, and with an absolute path."""
        # An empty variable counts as unset.
        uri = settings.uri or os.environ.get(cls.variable) or None
        if uri is not None and "://" not in uri:
            uri = str(Path(uri).absolute())
        return settings.model_copy(update={"uri": uri})

    def close(self, is_done: bool) -> None:  # noqa: B027 - some have nothing to close
        """End; `is_done` says that all rounds were trained."""


def tracker_class(name: str) -> type[Tracker]:
    """Return the class of a tracker, imported with its package. Raises TypeError if its row names anything else."""
    found = pkgutil.resolve_name(TRACKER_KINDS[name].tracker)
    if not (isinstance(found, type) and issubclass(found, Tracker)):
        raise TypeError(f"{TRACKER_KINDS[name].tracker} is not a Tracker")
    return found
