"""An engine on a Ray cluster that loses a node at work in each map."""

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

_NUM_NODES = 3


def open_on(cluster: RayCluster, folder: Path) -> Engine:
    """Return the engine of a run in `folder` on the cluster."""
    return open_engine(EngineConfig(kind="ray", address=cluster.address), folder)


class LossyEngine(Engine):
    """Works on a cluster of three nodes, of which each map loses one; another one takes its place.

    In turn, the node is lost while it writes a file, in the first map if `in_writing`, and after all work on a part.
    No task runs on the head, which must not be lost. folder: for files of its own. num_maps: with losses, the first
    ones; None: all. num_parts: the number of parts of each map.
    """

    def __init__(self, cluster: RayCluster, folder: Path, in_writing: bool = True, num_maps: int | None = None) -> None:
        self._cluster, self._folder, self._in_writing, self._num_maps = cluster, folder, in_writing, num_maps
        self.num_parts: list[int] = []

    def __enter__(self) -> "LossyEngine":
        import ray

        from flows.cluster.nodes import on_node

        self._folder.mkdir(parents=True)
        self._cluster.resize(_NUM_NODES)
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
        """Yield the result of each part; assert that a node was lost."""
        self.num_parts.append(len(parts))
        if self._num_maps is not None and len(self.num_parts) > self._num_maps:
            yield from self._engine.map(work, parts, report, is_long)
            return
        mark, waits = (self._folder / f"{name}-{len(self.num_parts)}" for name in ("map", "waits"))
        lost: list[str] = []

        def kill(units: int) -> None:
            if not lost and waits.exists():
                lost.append(waits.read_text())
                self._cluster.kill(lost[0])
                self._cluster.resize(_NUM_NODES)
            report(units)

        in_writing = (len(self.num_parts) % 2 == 1) == self._in_writing
        yield from self._engine.map(partial(_work_until_lost, mark, waits, in_writing, work), parts, kill, is_long)
        assert lost


class _Other:
    """An actor of another user."""

    def wait(self) -> None:
        pass


def _work_until_lost(mark: Path, waits: Path, in_writing: bool, work: Work[Any, Any], part: Any, count: Count) -> Any:
    """Return the result of a part, unless this is the first attempt at any, whose node is to be lost."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return work(part, count)
    if in_writing:
        # The file stays under its temporary name.
        data_scoring.base.files.commit = partial(_wait_to_be_killed, waits)
    work(part, count)
    _wait_to_be_killed(waits)


def _wait_to_be_killed(waits: Path, *_: Path) -> NoReturn:
    import ray

    temporary = waits.with_suffix(".tmp")
    temporary.write_text(ray.get_runtime_context().get_node_id())
    temporary.rename(waits)
    while True:
        time.sleep(1)
