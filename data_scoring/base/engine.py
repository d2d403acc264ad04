"""Engines: how the work on the parts of a stage's input is run: in this process, in a pool of processes, or on Ray.

A stage cuts its input into parts, has an engine work on each of them, and merges the results. The parts depend on the
input alone, so that the results are the same whatever engine works on them.
"""

import os
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

from data_scoring.base.progress import Progress
from data_scoring.base.temporary_folders import temporary_folder

if TYPE_CHECKING:
    from concurrent.futures import Future

Part = TypeVar("Part")
Result = TypeVar("Result")
# Called with the number of units that are done, such as documents: of one part, or of all parts together.
Count = Callable[[int], None]
# Returns the result of one part. Raises ValueError for bad input.
Work = Callable[[Part, Count], Result]

_SECONDS_BETWEEN_LOOKS = 0.2

_threads: int | None = None


def num_threads() -> int | None:
    """Return the number of threads that a library may use in this process, or None for as many as there are cores."""
    return _threads


def limit_threads(count: int) -> None:
    """Have libraries use at most `count` threads in this process, which is a worker among others."""
    global _threads  # noqa: PLW0603 - a property of the process
    import pyarrow as pa

    _threads = count
    # Read by libraries when they first use threads.
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if count > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(count)
    pa.set_cpu_count(count)
    pa.set_io_thread_count(max(2, count))


class Engine(ABC):
    """Runs work on the parts of a stage's input; a context manager, at whose end no work runs any more."""

    @abstractmethod
    def num_workers(self, num_parts: int, is_long: bool = True) -> int:
        """Return how many parts of a `map` are worked on at the same time on one host, which share its memory."""

    @abstractmethod
    def map(
        self, work: Work[Part, Result], parts: Sequence[Part], report: Count, is_long: bool = True
    ) -> Iterator[Result]:
        """Yield the result of each part, in the order of `parts`, which are worked on at the same time in any order.

        `work` and the parts must be picklable: a function of a module, or a partial of one. Its result is small; data
        goes to files. A part may be worked on twice, even at the same time, if a worker is lost: so work writes a file
        under a temporary name (`writing`), and the same content each time.

        report: called with the units done in all parts. is_long: whether all parts together take a minute or more, so
        that starting processes pays. Raises the error of the first part, in their order, whose work fails.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:  # noqa: B027 - an engine without workers has nothing to end
        """End all workers, at once; files that they were writing are left under temporary names."""


class LocalEngine(Engine):
    """Works in this process, or in a pool of `processes` processes; None: as many as there are cores, where it pays."""

    def __init__(self, processes: int | None = None) -> None:
        self._processes = processes
        self._executor: Any = None

    def num_workers(self, num_parts: int, is_long: bool = True) -> int:
        """Return the number of processes, at most one for each part."""
        processes = self._processes or (_num_cores() if is_long else 1)
        return max(1, min(processes, num_parts))

    def map(
        self, work: Work[Part, Result], parts: Sequence[Part], report: Count, is_long: bool = True
    ) -> Iterator[Result]:
        """Yield the result of each part, in their order."""
        if self.num_workers(len(parts), is_long) > 1:
            yield from self._map_in_pool(work, parts, report)
            return
        done = 0
        for part in parts:
            last = 0

            def count(units: int) -> None:
                nonlocal last
                last = units
                report(done + units)  # noqa: B023 - called in this iteration only

            yield work(part, count)
            done += last

    def _map_in_pool(self, work: Work[Part, Result], parts: Sequence[Part], report: Count) -> Iterator[Result]:
        from loky.process_executor import TerminatedWorkerError

        with temporary_folder() as folder:
            counts_path = folder / "counts"
            counts_path.write_bytes(bytes(8 * len(parts)))
            counts = np.memmap(counts_path, np.int64, mode="r")
            futures: list[Future[Result]] = [
                self._pool().submit(_work_on, work, part, number, counts_path) for number, part in enumerate(parts)
            ]
            try:
                for future in futures:
                    while not wait([future], _SECONDS_BETWEEN_LOOKS).done:
                        report(int(counts.sum()))
                    result = future.result()
                    # Whoever takes the last result may not ask for another one.
                    report(int(counts.sum()))
                    yield result
            except TerminatedWorkerError:
                raise ValueError(
                    "engine.processes: a process of the pool was killed, probably because memory ran out; lower "
                    "engine.processes and run the same command again: completed work is kept"
                ) from None
            finally:
                for future in futures:
                    future.cancel()

    def _pool(self) -> Any:
        if self._executor is None:
            from loky.backend import get_context
            from loky.process_executor import ProcessPoolExecutor

            self._executor = ProcessPoolExecutor(
                self._processes or _num_cores(),
                context=get_context("loky"),
                initializer=_start_worker,
                initargs=(os.getpid(),),
            )
        return self._executor

    def close(self) -> None:
        """End the processes of the pool."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, kill_workers=True)
            self._executor = None


def _num_cores() -> int:
    """Return the number of cores that this process may use; a container's limit counts."""
    from loky import cpu_count

    return int(cpu_count())


def _start_worker(parent: int) -> None:
    """Prepare a process of the pool: one thread, and an end when the process `parent` ends, however it does."""
    # A terminal sends Ctrl-C to all processes; the parent ends the pool.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    limit_threads(1)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    os._exit(1)


def _work_on(work: Work[Part, Result], part: Part, number: int, counts_path: Path) -> Result:
    counts = np.memmap(counts_path, np.int64, mode="r+")

    def count(units: int) -> None:
        counts[number] = units

    return work(part, count)


def finish(results: Iterator[None]) -> None:
    """Wait until all parts are done, whose results are in their files."""
    for _ in results:
        pass


def reporting(progress: Progress, what: str, total: int | None = None) -> Count:
    """Return a count that reports to `progress` as `what`."""
    return lambda done: progress(what, done, total)
