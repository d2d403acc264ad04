"""An engine on a Ray cluster that loses, in each map, a node in the middle of its work, and a process at its end."""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import data_scoring.base.files
from data_scoring.base.engine import Count, Engine, Work
from flows.cluster.engines import open_engine
from flows.run.config import EngineConfig
from tests.ray_cluster import RayCluster


def open_on(cluster: RayCluster, folder: Path) -> Engine:
    """Return the engine of a run in `folder` on the cluster."""
    return open_engine(EngineConfig(kind="ray", address=cluster.address), folder)


class LossyEngine(Engine):
    """Works on a cluster of `num_nodes` nodes, of which each map loses one; another one takes its place.

    No task runs on the head, which must not be lost. folder: for files of its own. num_maps: with losses, the first
    ones; None: all. num_parts: the number of parts of each map.
    """

    def __init__(self, cluster: RayCluster, folder: Path, num_nodes: int = 3, num_maps: int | None = None) -> None:
        self._cluster, self._folder, self._num_nodes, self._num_maps = cluster, folder, num_nodes, num_maps
        self.num_parts: list[int] = []

    def __enter__(self) -> "LossyEngine":
        import ray

        from flows.cluster.nodes import on_node

        self._folder.mkdir(parents=True)
        self._cluster.resize(self._num_nodes)
        self._engine = open_on(self._cluster, self._folder)
        # The engine's check of the nodes takes no CPU, and its tasks take one.
        on_head = on_node(self._cluster.head_id)
        self._other = ray.remote(num_cpus=1)(_Other).options(scheduling_strategy=on_head).remote()
        ray.get(self._other.wait.remote())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import ray

        ray.kill(self._other)
        self._engine.close()

    def num_workers(self, num_parts: int, is_long: bool = True) -> int:
        """Return the number of tasks that run at the same time on the largest node."""
        return self._engine.num_workers(num_parts, is_long)

    def map(self, work: Work[Any, Any], parts: Sequence[Any], report: Count, is_long: bool = True) -> Iterator[Any]:
        """Yield the result of each part; assert that a node and a process were lost."""
        self.num_parts.append(len(parts))
        if self._num_maps is not None and len(self.num_parts) > self._num_maps:
            yield from self._engine.map(work, parts, report, is_long)
            return
        marks = self._folder / f"map-{len(self.num_parts)}"
        marks.mkdir()
        lost: list[str] = []

        def kill(units: int) -> None:
            if not lost and (marks / "waits").exists():
                lost.append((marks / "waits").read_text())
                self._cluster.kill(lost[0])
                self._cluster.resize(self._num_nodes)
            report(units)

        yield from self._engine.map(partial(_work_until_lost, marks, work), parts, kill, is_long)
        assert lost
        assert (marks / "process").exists()


class _Other:
    """An actor of another user."""

    def wait(self) -> None:
        pass


def _work_until_lost(marks: Path, work: Work[Any, Any], part: Any, count: Count) -> Any:
    """Return the result of a part, unless this is the attempt whose node, or whose process, is to be lost."""
    if _is_first(marks / "node"):
        # A file that it writes stays under its temporary name.
        data_scoring.base.files.commit = partial(_wait_to_be_killed, marks)
        work(part, count)
        _wait_to_be_killed(marks)
    result = work(part, count)
    if _is_first(marks / "process"):
        # What it wrote is there, but nobody has its result.
        os.kill(os.getpid(), signal.SIGKILL)
    return result


def _is_first(mark: Path) -> bool:
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _wait_to_be_killed(marks: Path, *_: Path) -> NoReturn:
    import ray

    (marks / "is-ready").write_text(ray.get_runtime_context().get_node_id())
    (marks / "is-ready").rename(marks / "waits")
    while True:
        time.sleep(1)
