"""The command `watch`: follows a run in another terminal, until it ends."""

import argparse
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_scoring.base.live_rows import read_live_rows
from data_scoring.base.progress import Reported, read_progress
from flows.cli.options import path
from flows.run.folder import Run, read_run
from flows.run.locks import is_locked
from flows.stages.status import StageStatus, status_of

_SECONDS_BETWEEN_LOOKS = 1.0
_LEAST_SHARE_OF_REST = 4
_SECONDS_BETWEEN_LINES = 10.0
_CURVE_HEIGHT = 8
_MOST_STAGES = 10
_STYLES = {"done": "green", "running": "bold", "failed": "red", "stopped": "yellow", "waiting": "dim"}


def add_watch(commands: Any) -> None:
    """Add `watch`."""
    watch = commands.add_parser("watch", help="follow a run: stages, time left and losses, until it ends")
    watch.add_argument("run", type=path, metavar="RUN", help="run folder")
    watch.set_defaults(command=_watch)


@dataclass(frozen=True)
class _Look:
    """What a look at a run has seen. losses, rounds: of each training step so far, and its round, [n] each."""

    is_running: bool
    stages: list[StageStatus]
    progress: Reported | None
    losses: NDArray[np.float64]
    rounds: NDArray[np.int64]

    @property
    def current(self) -> StageStatus | None:
        """Return the first stage that is not done."""
        return next((stage for stage in self.stages if stage.state != "done"), None)


def _watch(options: argparse.Namespace) -> None:
    run = read_run(options.run)
    watched = _Watched(run)
    try:
        if sys.stdout.isatty():
            _show(watched)
        else:
            _print(watched)
    except KeyboardInterrupt:
        # The usual end; the run goes on.
        return


class _Watched:
    """A run that is looked at again and again."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._complete: dict[int, list[float]] = {}
        self._seconds = 0.0

    def rest(self) -> None:
        """Wait before the next look: the more, the longer the last one took."""
        time.sleep(max(_SECONDS_BETWEEN_LOOKS, _LEAST_SHARE_OF_REST * self._seconds))

    def look(self) -> _Look:
        """Return what the run folder shows now."""
        run, started = self.run, time.monotonic()
        # Before the stages, so that the last look at a run shows its end.
        is_running = is_locked(run.folder)
        losses: list[NDArray[np.float64]] = []
        for number in range(1, run.config.rounds.num_rounds + 1):
            found = self._complete.get(number)
            if found is None:
                found = [row["loss"] for row in read_live_rows(run.round_folder(number) / "steps.parquet")[1]]
                if run.recorded("train", number) is not None:
                    self._complete[number] = found
            losses.append(np.array(found, dtype=float))
        stages = status_of(run)
        progress = read_progress(run.folder / "logs" / "progress.json") if is_running else None
        self._seconds = time.monotonic() - started
        rounds = np.repeat(np.arange(1, len(losses) + 1), [len(each) for each in losses])
        return _Look(is_running, stages, progress, np.concatenate(losses), rounds)


def _print(watched: _Watched) -> None:
    """Print a line for every change of a stage, and one about progress every few seconds."""
    from flows.display.terminal_progress import Pace

    states: dict[str, str] = {}
    pace, printed = Pace(), time.monotonic()
    while True:
        look = watched.look()
        for stage in look.stages:
            if stage.state != states.get(stage.name) and (stage.state != "waiting" or stage is look.current):
                detail = "" if stage.state == "running" else f"  {stage.detail}"
                print(f"{stage.name}: {stage.state}{detail}".rstrip(), flush=True)
            states[stage.name] = stage.state
        if not look.is_running:
            print(_end(watched.run, look))
            return
        if look.progress is not None:
            pace.note(look.progress.what, look.progress.done)
            if time.monotonic() - printed > _SECONDS_BETWEEN_LINES:
                printed = time.monotonic()
                print(f"{_line(pace, look.progress)}{_details(look.progress)}", flush=True)
        watched.rest()


def _show(watched: _Watched) -> None:
    """Show the run on the terminal, until it ends."""
    from rich.console import Console
    from rich.live import Live

    from flows.display.terminal_progress import Pace

    console, pace = Console(), Pace()
    look = watched.look()
    with Live(_page(watched.run, look, pace, console), console=console, auto_refresh=False) as live:
        while look.is_running:
            watched.rest()
            look = watched.look()
            live.update(_page(watched.run, look, pace, console), refresh=True)
    console.print(_end(watched.run, look), markup=False, highlight=False)


def _page(run: Run, look: _Look, pace: Any, console: Any) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from flows.display.terminal_curve import draw_curve

    width = min(console.width, 120)
    lines: list[Any] = [Text(run.folder.name, style="bold", overflow="ellipsis", no_wrap=True)]
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis")
    for stage in _around_current(look):
        # The progress has a line of its own.
        detail = "" if stage.state == "running" else stage.detail
        table.add_row(stage.name, Text(stage.state, style=_STYLES.get(stage.state, "")), Text(detail))
    lines.append(table)
    if look.progress is not None:
        pace.note(look.progress.what, look.progress.done)
        lines.append(Text(_line(pace, look.progress), overflow="ellipsis", no_wrap=True))
        lines.append(Text(_details(look.progress).removeprefix("; "), style="dim", overflow="ellipsis", no_wrap=True))
    if len(look.losses):
        is_ascii = not str(console.encoding).lower().startswith("utf")
        lines += draw_curve(look.losses, look.rounds, width, _CURVE_HEIGHT, is_ascii)
        lines.append(Text(f"{'':8}training loss, {_steps(look)}", style="dim", overflow="ellipsis", no_wrap=True))
    return Group(*lines)


def _around_current(look: _Look) -> list[StageStatus]:
    """Return the stages that are shown: as many as fit, with the current one."""
    stages = look.stages
    place = stages.index(look.current) if look.current is not None else len(stages)
    start = max(0, min(place - _MOST_STAGES // 2, len(stages) - _MOST_STAGES))
    return stages[start : start + _MOST_STAGES]


def _steps(look: _Look) -> str:
    """Return how many steps each round has done, in words."""
    numbers, counts = np.unique(look.rounds, return_counts=True)
    shown = [f"round {number}: {count:,} steps" for number, count in zip(numbers, counts, strict=True)]
    return ", ".join(shown if len(shown) <= 3 else [shown[0], "…", shown[-1]])


def _line(pace: Any, progress: Reported) -> str:
    return str(pace.line(progress.what, progress.done, progress.total))


def _details(progress: Reported) -> str:
    return "".join(f"; {name.replace('_', ' ')} {value:,.4g}" for name, value in progress.details.items())


def _end(run: Run, look: _Look) -> str:
    """Return the last line: how the run ended."""
    if look.current is None:
        return f"done: {run.folder / 'report.html'}"
    return f"{look.current.state} at {look.current.name}; `reprise run {run.folder}` resumes it"
