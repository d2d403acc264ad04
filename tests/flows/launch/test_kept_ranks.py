"""Kept ranks end while the command goes on; a launch, and the end of the context, wait for them."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_scoring.base.files import read_json
from flows.launch.launcher import KeptRanks, Launcher
from flows.run.config import LaunchConfig


class WaitingRanks(Launcher):
    """Ranks that wait until they are stopped, or until `has_ended` is set."""

    fault: OSError | None = None

    def __init__(self, run_folder: Path) -> None:
        (run_folder / "logs").mkdir()
        job: Any = SimpleNamespace(errors=run_folder / "errors", can_follow=lambda other: False)
        super().__init__(job, "train-1", run_folder, LaunchConfig())
        self.has_ended = threading.Event()
        self.was_running = False

    def plan(self, command: Sequence[str]) -> str:
        return ""

    def start(self) -> None:
        """Nothing is started."""

    def poll(self) -> int | None:
        return 0 if self.has_ended.is_set() else None

    def stop(self) -> None:
        self.was_running = not self.has_ended.is_set()
        self.has_ended.set()
        if self.fault is not None:
            raise self.fault

    def describe(self) -> str:
        return ""


@pytest.fixture
def ranks(tmp_path: Path) -> WaitingRanks:
    return WaitingRanks(tmp_path)


def end_later(ranks: WaitingRanks) -> None:
    threading.Timer(0.5, ranks.has_ended.set).start()


def test_closing_returns_at_once_and_the_context_waits(ranks: WaitingRanks) -> None:
    with KeptRanks() as kept:
        kept.keep(ranks)
        kept.close()
        assert not ranks.has_ended.is_set()
        path = ranks.run_folder / "logs" / "train-1.next.json"
        while not path.exists():
            time.sleep(0.01)
        assert read_json(path) == {"job": None}
        end_later(ranks)
    assert ranks.has_ended.is_set()
    assert not ranks.was_running
    assert not path.exists()


def test_the_next_launch_waits(ranks: WaitingRanks) -> None:
    with KeptRanks() as kept:
        kept.keep(ranks)
        kept.close()
        end_later(ranks)
        assert kept.take(ranks.job) is None
        assert ranks.has_ended.is_set()


def test_after_an_error_they_are_stopped(ranks: WaitingRanks) -> None:
    with pytest.raises(RuntimeError, match="of a stage"), KeptRanks() as kept:
        kept.keep(ranks)
        kept.close()
        raise RuntimeError("of a stage")
    assert ranks.was_running


@pytest.mark.parametrize("waits", ["at the end", "at the next launch"])
def test_an_error_of_their_end_is_raised_where_it_is_waited_for(ranks: WaitingRanks, waits: str) -> None:
    ranks.fault = OSError("no space")
    with pytest.raises(OSError, match="no space"), KeptRanks() as kept:
        kept.keep(ranks)
        kept.close()
        ranks.has_ended.set()
        if waits == "at the next launch":
            kept.take(ranks.job)
