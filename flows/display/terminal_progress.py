"""Progress on standard error: a bar on a terminal, otherwise a line every few seconds."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

_SECONDS_BETWEEN_LINES = 10.0
_NARROWEST_BAR, _WIDEST_BAR = 8, 40


class _CountColumn(ProgressColumn):
    """Shows the number of units done, and the total if it is known."""

    def render(self, task: Task) -> Text:
        """Return both numbers."""
        return Text(f"{task.completed:,.0f}" + ("" if task.total is None else f"/{task.total:,.0f}"))


class _RateColumn(ProgressColumn):
    """Shows the number of units done per second."""

    def render(self, task: Task) -> Text:
        """Return the rate, empty while it is unknown."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f}/s" if speed else "")


class Pace:
    """The pace of successive pieces of work, as text."""

    def __init__(self) -> None:
        self.work = ""
        self._started, self._first = 0.0, 0

    def note(self, what: str, done: int) -> bool:
        """Record that `done` units of `what` are done; return whether this is a new piece of work."""
        # Details may follow the work's name after a dot.
        work = what.split(" · ", maxsplit=1)[0]
        is_new = work != self.work
        if is_new:
            self.work, self._started, self._first = work, time.monotonic(), done
        return is_new

    def line(self, what: str, done: int, total: int | None) -> str:
        """Return the progress of `what`, its rate and the seconds left, as one line."""
        if total is None:
            return f"{what}: {done:,}" if done else what
        fresh, seconds = done - self._first, time.monotonic() - self._started
        if not fresh or done >= total:
            return f"{what}: {done:,} of {total:,}"
        return f"{what}: {done:,} of {total:,}, {fresh / seconds:,.1f}/s, {seconds / fresh * (total - done):.0f} s left"


class TerminalProgress:
    """Shows the progress of successive pieces of work on standard error; a context manager and a progress callback."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr)
        self._bars: Progress | None = None
        self._pace = Pace()
        self._task: TaskID | None = None
        self._printed = 0.0
        self._is_over = False

    def __enter__(self) -> "TerminalProgress":
        if self._console.is_terminal:
            # The numbers are shown whole; the description, which begins with the work's name, takes what is left.
            rest, whole = Column(ratio=1, no_wrap=True, overflow="ellipsis"), Column(no_wrap=True, justify="right")
            width = min(_WIDEST_BAR, max(_NARROWEST_BAR, self._console.width - 88))
            self._bars = Progress(
                TextColumn("{task.description}", markup=False, table_column=rest),
                BarColumn(width),
                _CountColumn(whole),
                _RateColumn(whole),
                TimeElapsedColumn(whole),
                TimeRemainingColumn(table_column=whole),
                console=self._console,
                expand=True,
            )
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._end_bar(is_done=error is None)
            self._bars.stop()

    def __call__(self, what: str, done: int, total: int | None) -> None:
        """Show that `done` of `total` units of `what` are done; details may follow its name after a dot."""
        now = time.monotonic()
        is_new = self._pace.note(what, done)
        if is_new:
            self._printed = now
            self._is_over = False
        if self._bars is not None:
            if is_new or self._task is None:
                self._end_bar(is_done=True)
                self._task = self._bars.add_task(what, total=total)
            self._bars.update(self._task, description=what, completed=done, total=total)
        elif now - self._printed > _SECONDS_BETWEEN_LINES or (done == total and not self._is_over):
            self._printed = now
            self._is_over = done == total
            print(self._pace.line(what, done, total), file=sys.stderr, flush=True)

    def _end_bar(self, is_done: bool) -> None:
        """Stop the clock of the previous piece of work; if it is done, a total that was unknown is what was done."""
        if self._bars is not None and self._task is not None:
            task = self._bars.tasks[self._task]
            if is_done and task.total is None:
                self._bars.update(self._task, total=task.completed)
            self._bars.stop_task(self._task)
