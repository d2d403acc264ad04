"""The local engine's processes; what all engines have in common is in tests/flows/cluster/test_engines.py."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest

from data_scoring.base.engine import LocalEngine
from tests.engine_work import begin_and_sleep, die_once, square

MAP = """
import sys
from functools import partial
from pathlib import Path
from data_scoring.base.engine import LocalEngine
from tests.engine_work import beat

with LocalEngine(2) as engine:
    list(engine.map(partial(beat, Path(sys.argv[1])), [0, 1], lambda units: None))
"""


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_process_is_one_line_that_names_the_field(tmp_path: Path) -> None:
    with (
        LocalEngine(2) as engine,
        pytest.raises(ValueError, match=r"^engine\.processes: a process of the pool was killed, .* lower .*kept$"),
    ):
        list(engine.map(partial(die_once, tmp_path), range(4), lambda units: None))


def test_short_work_starts_no_process_unless_a_number_is_set() -> None:
    before = {child.pid for child in psutil.Process().children()}
    with LocalEngine() as engine:
        assert engine.num_workers(9, is_long=False) == 1
        assert list(engine.map(square, range(3), lambda units: None, is_long=False)) == [0, 1, 4]
        assert {child.pid for child in psutil.Process().children()} == before
    assert LocalEngine(3).num_workers(9, is_long=False) == 3
    assert LocalEngine(3).num_workers(2) == 2


def test_all_units_are_reported_before_the_last_result(tmp_path: Path) -> None:
    reported: list[int] = []
    with LocalEngine(2) as engine:
        results = engine.map(partial(begin_and_sleep, tmp_path), range(1, 4), reported.append)
        assert [next(results) for _ in range(3)] == [1, 4, 9]
        # Nothing more is asked of `results`.
        assert reported[-1] == 1 + 2 + 3


def test_processes_end_with_a_parent_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beats, temporary = tmp_path / "beats", tmp_path / "temporary"
    beats.mkdir()
    temporary.mkdir()
    parent = subprocess.Popen([sys.executable, "-c", MAP, str(beats)], env={**os.environ, "TMPDIR": str(temporary)})
    try:
        wait_for(lambda: len(list(beats.iterdir())) == 2)
        children = psutil.Process(parent.pid).children(recursive=True)
    finally:
        parent.kill()
        parent.wait()
    assert len(children) >= 2
    wait_for(lambda: not any(child.is_running() and child.status() != "zombie" for child in children))
    # What it has left is deleted by the next.
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    assert len(list(temporary.iterdir())) == 1
    with LocalEngine(2) as engine:
        assert list(engine.map(square, [1, 2], lambda units: None)) == [1, 4]
    assert list(temporary.iterdir()) == []
