"""The engine that has a Ray cluster work on the parts of a stage's input, each as a task."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from data_scoring.base.engine import Count, Engine, Part, Result, Work, limit_threads
from flows.cluster.connection import connected
from flows.cluster.nodes import Node, check_nodes, list_nodes, on_node, one_line

_SECONDS_BETWEEN_REPORTS = 0.5
_SECONDS_BETWEEN_CANCELS = 1.0
_SECONDS_TO_END = 20
# How long the last node may have been lost before another one joins.
_SECONDS_WITHOUT_NODES = 600.0
# How often a task is started again whose process or node is lost.
_MAX_RETRIES = 5
# Tasks that are submitted but not done, for each that can run: no CPU waits for the driver.
_TASKS_PER_SLOT = 2


class RayEngine(Engine):
    """Works on the Ray cluster at `address` (see `connection.connect`), each part a task with `cpus_per_task` CPUs.

    folder: of the run, which all nodes have to see. Raises ValueError if they do not, if no cluster answers, or if it
    has no node with so many CPUs.
    """

    def __init__(self, address: str, cpus_per_task: int, folder: Path) -> None:
        self._cpus = cpus_per_task
        self._tasks: _Tasks | None = None
        with ExitStack() as stack:
            stack.enter_context(connected(address, "engine"))
            nodes = list_nodes()
            largest = max(node.resources.get("CPU", 0) for node in nodes)
            if largest < cpus_per_task:
                raise ValueError(
                    f"engine.cpus_per_task: {cpus_per_task}, but the largest node of the Ray cluster has {largest:g} "
                    "CPUs; lower it"
                )
            check_nodes([node for node in nodes if self._num_slots(node)], folder, "engine")
            self._connection = stack.pop_all()

    def _num_slots(self, node: Node) -> int:
        """Return how many tasks run on a node at the same time."""
        return int(node.resources.get("CPU", 0)) // self._cpus

    def num_workers(self, num_parts: int, is_long: bool = True) -> int:
        """Return the number of tasks that run at the same time on the largest node, at most one for each part."""
        return max(1, min(num_parts, max(map(self._num_slots, list_nodes()))))

    def map(
        self, work: Work[Part, Result], parts: Sequence[Part], report: Count, is_long: bool = True
    ) -> Iterator[Result]:
        """Yield the result of each part, in their order."""
        if not parts:
            return
        self._tasks = tasks = _Tasks(work, parts, self._cpus)
        outcomes: dict[int, _Outcome] = {}
        next_report, last_slots = 0.0, time.monotonic()
        try:
            for number in range(len(parts)):
                while number not in outcomes:
                    num_slots = sum(map(self._num_slots, list_nodes()))
                    last_slots = time.monotonic() if num_slots else last_slots
                    if time.monotonic() - last_slots > _SECONDS_WITHOUT_NODES:
                        raise ValueError(
                            f"engine.cpus_per_task: no node of the Ray cluster has had {self._cpus} CPUs for "
                            f"{_SECONDS_WITHOUT_NODES / 60:g} minutes; add nodes and run the same command again: "
                            "completed work is kept"
                        )
                    tasks.submit(_TASKS_PER_SLOT * max(1, num_slots))
                    outcomes.update(tasks.wait(_SECONDS_BETWEEN_REPORTS))
                    if time.monotonic() >= next_report:
                        report(tasks.count())
                        next_report = time.monotonic() + _SECONDS_BETWEEN_REPORTS
                result, error = outcomes.pop(number)
                if error is not None:
                    raise error
                yield result
            report(tasks.count())
        finally:
            tasks.end()

    def close(self) -> None:
        """End all tasks, and the use of the connection."""
        if self._tasks is not None:
            self._tasks.end()
        self._connection.close()


# The result of a part's work, or its error.
_Outcome = tuple[Any, Exception | None]


class _Tasks:
    """The tasks of one map, started in the order of the parts."""

    def __init__(self, work: Work[Part, Result], parts: Sequence[Part], cpus: int) -> None:
        self._parts, self._num_submitted, self._end = parts, 0, len(parts)
        self._units = np.zeros(len(parts), np.int64)
        self._running: dict[ray.ObjectRef, int] = {}
        self._task = ray.remote(num_cpus=cpus, max_retries=_MAX_RETRIES)(_work_on).remote
        self._cpus, self._work = cpus, ray.put(work)
        here = on_node(ray.get_runtime_context().get_node_id())
        self._counts = ray.remote(num_cpus=0)(_Counts).options(scheduling_strategy=here).remote()
        self._changes = self._counts.take.remote()
        self._has_ended = False

    def submit(self, limit: int) -> None:
        """Start tasks until `limit` run or wait for CPUs, unless a part has failed."""
        while self._num_submitted < self._end and len(self._running) < limit:
            number = self._num_submitted
            task = self._task(self._work, self._parts[number], number, self._counts, self._cpus)
            self._running[task] = number
            self._num_submitted += 1

    def wait(self, seconds: float) -> dict[int, _Outcome]:
        """Return the outcomes of tasks that have ended, by the parts' numbers, after `seconds` at most."""
        running = [*self._running]
        ended, _ = ray.wait(running, num_returns=1, timeout=seconds)
        if ended:
            ended, _ = ray.wait(running, num_returns=len(running), timeout=0)
        outcomes: dict[int, _Outcome] = {}
        for task in ended:
            number = self._running.pop(task)
            try:
                result, self._units[number] = ray.get(task)
                outcomes[number] = (result, None)
            except RayError as error:
                outcomes[number] = (None, _error_of(error))
                self._end = 0
        return outcomes

    def count(self) -> int:
        """Return the number of units that are done in all parts."""
        if ray.wait([self._changes], timeout=0)[0]:
            try:
                changes = ray.get(self._changes)
            except RayError:
                # Progress alone is lost: ended tasks still count.
                return int(self._units.sum())
            for number in set(changes).intersection(self._running.values()):
                self._units[number] = changes[number]
            self._changes = self._counts.take.remote()
        return int(self._units.sum())

    def end(self) -> None:
        """End the tasks that still run, at once."""
        if self._has_ended:
            return
        self._has_ended = True
        running, deadline = [*self._running], time.monotonic() + _SECONDS_TO_END
        while running and time.monotonic() < deadline:
            # Again: what is said to a task that is about to start may be lost.
            for task in running:
                ray.cancel(task, force=True)
            _, running = ray.wait(running, num_returns=len(running), timeout=_SECONDS_BETWEEN_CANCELS)
        ray.kill(self._counts)


class _Counts:
    """An actor that holds the number of units done in each part, as far as the driver has not taken them."""

    def __init__(self) -> None:
        self._changes: dict[int, int] = {}

    def set(self, number: int, units: int) -> None:
        self._changes[number] = units

    def take(self) -> dict[int, int]:
        changes, self._changes = self._changes, {}
        return changes


def _work_on(work: Work[Part, Result], part: Part, number: int, counts: Any, cpus: int) -> tuple[Result, int]:
    """Return the result of a part, and its number of units."""
    limit_threads(cpus)
    last, next_report = 0, 0.0

    def count(units: int) -> None:
        nonlocal last, next_report
        last = units
        if time.monotonic() >= next_report:
            counts.set.remote(number, units)
            next_report = time.monotonic() + _SECONDS_BETWEEN_REPORTS

    return work(part, count), last


def _error_of(error: RayError) -> Exception:
    """Return what the work raised, or, if Ray has given up a task, what happened and what to do."""
    if isinstance(error, RayTaskError):
        return error.cause if isinstance(error.cause, Exception) else error
    again = "run the same command again: completed work is kept"
    if isinstance(error, OutOfMemoryError):
        return ValueError(
            "engine.cpus_per_task: memory ran out on a node of the Ray cluster, again and again; raise it, so that "
            f"fewer parts are worked on at the same time, and {again}"
        )
    return ValueError(
        f"engine.kind: ray lost a part of the work {_MAX_RETRIES + 1} times ({one_line(error)}); see whether a node's "
        f"memory runs out, then raise engine.cpus_per_task, and {again}"
    )
