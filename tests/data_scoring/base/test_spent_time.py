"""Seconds of several attempts add up, whether they end or are killed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_scoring.base import spent_time
from data_scoring.base.spent_time import SpentTime
from tests import ROOT


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the clock shows, in its only entry."""
    now = [100.0]
    monkeypatch.setattr(spent_time.time, "monotonic", lambda: now[0])
    return now


def test_attempts_add_up_and_a_killed_one_counts_up_to_its_last_note(tmp_path: Path, clock: list[float]) -> None:
    path = tmp_path / "time.json"
    first = SpentTime(path, "f")
    clock[0] += 0.5
    first.note()
    assert not path.exists()
    clock[0] += 2.0
    first.note()
    clock[0] += 0.9
    first.note()
    assert first.seconds == pytest.approx(3.4)
    # Another process, another clock.
    clock[0] = 7.0
    second = SpentTime(path, "f")
    clock[0] += 10.0
    assert second.seconds == pytest.approx(12.5)
    second.note()
    clock[0] += 0.5
    second.note_now()
    assert json.loads(path.read_text()) == {"identity": "f", "seconds": pytest.approx(13.0)}
    second.forget()
    assert not path.exists()
    assert SpentTime(path, "f", recorded=12.5).seconds == 12.5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [
        '{"identity": "g", "seconds": 5.0}', '{"identity": "f"}', '{"identity": "f", "seconds": -1}',
        '{"identity": "f", "seconds": NaN}', '{"identity": "f", "seconds": true}', '{"identity": "f", "sec', "[]", "",
    ],
)  # fmt: skip
def test_the_time_of_other_work_and_damaged_files_do_not_count(tmp_path: Path, content: str) -> None:
    path = tmp_path / "time.json"
    path.write_text(content)
    assert SpentTime(path, "f", recorded=3.0).seconds == pytest.approx(3.0, abs=0.5)


def test_what_was_recorded_counts_if_it_is_more(tmp_path: Path) -> None:
    path = tmp_path / "time.json"
    path.write_text(json.dumps({"identity": "f", "seconds": 5}))
    assert SpentTime(path, "f", recorded=8.0).seconds == pytest.approx(8.0, abs=0.5)
    assert SpentTime(path, "f", recorded=2.0).seconds == pytest.approx(5.0, abs=0.5)


def test_a_process_that_is_killed_loses_at_most_a_second(tmp_path: Path) -> None:
    path = tmp_path / "time.json"
    code = f"""
import time
from pathlib import Path
from data_scoring.base.spent_time import SpentTime
spent = SpentTime(Path({str(path)!r}), "f")
print(flush=True)
while True:
    spent.note()
    time.sleep(0.01)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    started = time.monotonic()
    time.sleep(2.5)
    process.kill()
    process.wait()
    lived = time.monotonic() - started
    assert lived - 1.5 < SpentTime(path, "f").seconds < lived + 0.5
