"""What holds for every engine: this process, a pool of processes, and Ray clusters of one to three nodes."""

import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from data_scoring.base.engine import Engine
from flows.cluster.engines import open_engine
from flows.run.config import EngineConfig
from tests.engine_work import beat, begin_and_sleep, die, die_once, fail, square
from tests.flows.cluster.lossy_engine import open_on
from tests.ray_cluster import RayCluster

OpenEngine = Callable[[], Engine]


@pytest.fixture(params=["process", "2 processes", "1 node", "2 nodes", "3 nodes"], scope="module")
def open_any(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OpenEngine:
    """Opens an engine of each kind."""
    count, _, kind = request.param.partition(" ")
    if kind.startswith("node"):
        cluster = request.getfixturevalue("joined")
        cluster.resize(int(count))
        return lambda: open_on(cluster, tmp_path_factory.mktemp("run"))
    config = EngineConfig(processes=2 if kind else 1)
    return lambda: open_engine(config, tmp_path_factory.mktemp("run"))


def test_results_are_in_the_order_of_the_parts_and_all_units_are_reported(open_any: OpenEngine) -> None:
    reports: list[int] = []
    with open_any() as engine:
        assert 1 <= engine.num_workers(9) <= 2
        assert list(engine.map(square, [5, 0, 300, 2], reports.append)) == [25, 0, 90_000, 4]
        assert reports[-1] == 307
        assert reports == sorted(reports)
        # Nothing of the first map is left over in a second one, which is longer than what runs at once.
        assert list(engine.map(square, range(20), reports.append)) == [part * part for part in range(20)]
        assert reports[-1] == sum(range(20))
        assert list(engine.map(square, [], reports.append)) == []


def test_the_error_is_that_of_the_first_part_that_fails(open_any: OpenEngine) -> None:
    results = []
    with open_any() as engine, pytest.raises(ValueError, match="odd") as caught:
        for result in engine.map(fail, [0, 1, 2, 3, 5], lambda units: None):
            results.append(result)
    assert results == [0]
    assert type(caught.value) is ValueError
    assert str(caught.value) == "part 1 is odd"


@pytest.mark.parametrize("ends", ["report", "consumer"])
def test_no_work_goes_on_after_an_error_of_the_caller(open_any: OpenEngine, tmp_path: Path, ends: str) -> None:
    def report(units: int) -> None:
        if ends == "report" and units:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), open_any() as engine:
        outcomes = engine.map(partial(beat, tmp_path), range(6), report)
        if ends == "consumer":
            # As when the caller fails between two results: the parts are still worked on.
            outcomes = engine.map(partial(first_is_short, tmp_path), range(6), report)
            next(outcomes)
        for _ in outcomes if ends == "report" else ():
            pass
        raise KeyboardInterrupt
    ended = time.time()
    time.sleep(0.5)
    beats = [float(path.read_text() or 0) for path in tmp_path.iterdir()]
    assert all(beat <= ended for beat in beats)
    assert beats or ends == "consumer"


def first_is_short(folder: Path, part: int, count: Any) -> int:
    """Return at once for part 0."""
    return beat(folder, part, count) if part else part


def test_a_task_that_does_not_hear_of_its_end_is_told_again(
    joined: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    heard: set[ray.ObjectRef] = set()
    cancel = ray.cancel

    def lose_the_first(task: ray.ObjectRef, **options: Any) -> None:
        if task in heard:
            cancel(task, **options)
        heard.add(task)

    joined.resize(1)
    monkeypatch.setattr(ray, "cancel", lose_the_first)
    with open_on(joined, tmp_path) as engine:
        outcomes = engine.map(partial(first_is_short, tmp_path), range(6), lambda units: None)
        next(outcomes)
        wait_for(lambda: [*tmp_path.iterdir()])
    ended = time.time()
    time.sleep(0.5)
    assert heard
    assert all(float(path.read_text() or 0) <= ended for path in tmp_path.iterdir())


def test_a_part_whose_process_is_killed_is_worked_on_again(joined: RayCluster, tmp_path: Path) -> None:
    joined.resize(2)
    reports: list[int] = []
    with open_on(joined, tmp_path) as engine:
        assert list(engine.map(partial(die_once, tmp_path), range(4), reports.append)) == [0, 1, 4, 9]
    assert reports[-1] == 6


def test_a_part_that_kills_every_process_is_one_line(
    joined: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.cluster.ray_engine._MAX_RETRIES", 1)
    with (
        open_on(joined, tmp_path) as engine,
        pytest.raises(ValueError, match=r"^engine\.kind: ray lost") as caught,
    ):
        list(engine.map(die, range(1), lambda units: None))
    assert "lost a part of the work 2 times" in str(caught.value)
    assert "raise engine.cpus_per_task" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_node_lost_during_the_work_costs_its_running_parts_alone(joined: RayCluster, tmp_path: Path) -> None:
    cluster = joined
    cluster.resize(3)

    def report(units: int) -> None:
        if cluster.num_nodes == 3 and len(list(tmp_path.glob("*-*"))) >= 3:
            cluster.kill_newest()

    with open_on(joined, tmp_path) as engine:
        results = list(engine.map(partial(begin_and_sleep, tmp_path), range(8), report))
    assert cluster.num_nodes == 2
    assert results == [part * part for part in range(8)]
    # The attempt at one part was lost.
    assert len(list(tmp_path.glob("*-*"))) == 9


def test_a_cluster_that_has_lost_all_nodes_that_fit_is_one_line(
    joined: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.cluster.ray_engine._SECONDS_WITHOUT_NODES", 1.0)
    joined.resize(1)
    large = joined.add_node(num_cpus=2)
    killed: list[int] = []

    def report(units: int) -> None:
        if not killed and [*tmp_path.glob("*-*")]:
            killed.append(units)
            joined.kill_node(large)

    config = EngineConfig(kind="ray", address=joined.address, cpus_per_task=2)
    with (
        open_engine(config, tmp_path) as engine,
        pytest.raises(ValueError, match=r"^engine\.cpus_per_task: no node of the Ray cluster has had 2 CPUs") as caught,
    ):
        list(engine.map(partial(begin_and_sleep, tmp_path), range(8), report))
    assert "\n" not in str(caught.value)


def test_the_loss_of_the_progress_loses_no_work(joined: RayCluster, tmp_path: Path) -> None:
    import ray

    reports: list[int] = []
    joined.resize(2)
    with open_on(joined, tmp_path) as engine:
        results = engine.map(partial(begin_and_sleep, tmp_path), range(4), reports.append)
        assert next(results) == 0
        ray.kill(engine._tasks._counts)  # type: ignore[attr-defined]
        assert list(results) == [1, 4, 9]
    assert reports[-1] == 6


DRIVER = """
import sys
from functools import partial
from pathlib import Path
from flows.cluster.engines import open_engine
from flows.run.config import EngineConfig
from tests.engine_work import beat

folder = Path(sys.argv[2])
with open_engine(EngineConfig(kind="ray", address=sys.argv[1]), folder) as engine:
    list(engine.map(partial(beat, folder), [0], lambda units: None))
"""


def test_tasks_end_with_a_driver_that_is_killed(cluster: RayCluster, tmp_path: Path) -> None:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, cluster.address, str(tmp_path)])
    beats = tmp_path / "0"
    try:
        wait_for(beats.exists)
    finally:
        driver.kill()
        driver.wait()
    wait_for(lambda: time.time() - beats.stat().st_mtime > 1)


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


WITHOUT_RAY = """
import importlib, pkgutil, sys
from pathlib import Path

sys.modules["ray"] = None
import flows

for module in pkgutil.walk_packages(flows.__path__, "flows."):
    # Trackers are as optional.
    if module.name not in sys.argv[1:] and not module.name.endswith("_tracker"):
        importlib.import_module(module.name)
from flows.cluster.engines import open_engine
from flows.run.config import EngineConfig

try:
    open_engine(EngineConfig(kind="ray"), Path())
except ValueError as error:
    print(error)
"""


def test_without_ray_all_other_modules_are_imported_and_the_engine_says_what_to_install() -> None:
    needs_ray = ["flows.cluster.ray_engine", "flows.cluster.nodes", "flows.launch.ray_nodes"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_RAY, *needs_ray], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == (
        "engine.kind: ray is not installed; install it with `pip install 'reprise-lm[ray]'`"
    )
