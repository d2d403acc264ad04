"""Engines that lose a worker, or have parts worked on twice."""

import os
import signal
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from data_scoring.base.engine import Count, LocalEngine, Work


class TwiceEngine(LocalEngine):
    """Has two processes work on each part, at the same time, as if a slow one had been taken for lost."""

    def __init__(self) -> None:
        super().__init__(2)

    def map(self, work: Work[Any, Any], parts: Sequence[Any], report: Count, is_long: bool = True) -> Iterator[Any]:
        """Yield the first result of each part."""
        twice = [part for part in parts for _ in range(2)]
        yield from islice(super().map(work, twice, lambda done: report(done // 2), is_long), 0, None, 2)


class DeadlyEngine(LocalEngine):
    """Loses a process after it has worked on the part with number `place`, unless `marker` exists."""

    def __init__(self, place: int, marker: Path) -> None:
        super().__init__(2)
        self._place, self._marker = place, marker

    def map(self, work: Work[Any, Any], parts: Sequence[Any], report: Count, is_long: bool = True) -> Iterator[Any]:
        """Yield the result of each part."""
        deadly = parts[min(self._place, len(parts) - 1)]
        return super().map(partial(_kill, self._marker, deadly, work), parts, report, is_long)


def _kill(marker: Path, deadly: Any, work: Work[Any, Any], part: Any, count: Count) -> Any:
    result = work(part, count)
    if part == deadly and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return result
