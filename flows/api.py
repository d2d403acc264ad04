"""Reprise from Python: open runs and read what they hold, start runs and wait for them. docs/python.md has examples.

What is not in `__all__`, and other modules, may change from version to version. Nothing is printed unless it is asked
for. Errors are exceptions: ValueError for what the caller can correct, and RunFailedError for a run that ended without
completing.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb
import yaml

from data_scoring.base.user_paths import expand_home
from data_scoring.ledger import create_views
from data_scoring.sandboxed_query import SECONDS
from flows.report.samples import Sample, find_samples, query, texts_of
from flows.run.config import RunConfig, read_config
from flows.run.folder import read_run
from flows.stages.status import RunStatus, StageStatus, read_run_status, read_run_statuses

__all__ = [
    "OpenRun",
    "RunConfig",
    "RunFailedError",
    "RunStatus",
    "Sample",
    "StageStatus",
    "StartedRun",
    "list_runs",
    "open_run",
    "start_run",
]

_SECONDS_BETWEEN_LOOKS = 0.2


class RunFailedError(RuntimeError):
    """A run ended without completing; the message says why. Starting it again resumes it."""


class OpenRun:
    """A run folder, open for reading; it may be complete or not, or be trained by another process meanwhile.

    Relations are DuckDB's: `.df()`, `.pl()` and `.to_arrow_table()` return them as pandas, polars and Arrow, if these
    packages are installed, and `.fetchall()` as tuples.
    """

    def __init__(self, folder: Path) -> None:
        """Open the run in `folder`. Raises ValueError if it is not a run folder."""
        run = read_run(folder)
        self.folder: Path = run.folder
        self.config: RunConfig = run.config
        self._texts = texts_of(run)

    def __repr__(self) -> str:
        return f"OpenRun({str(self.folder)!r})"

    def status(self) -> RunStatus:
        """Return which stages are done, running, failed, stopped or waiting, as `reprise status` does."""
        return read_run_status(self.folder)

    def ledger(self) -> duckdb.DuckDBPyConnection:
        """Return a new connection to the views of the ledger, with sample_text, sample_origin and sample_texts.

        Its views cover the files that there are now: open another one after a stage has ended. Any statement can be
        executed, and any file be read; tables that are made there are in memory.
        """
        connection = duckdb.connect()
        create_views(connection, self.folder.resolve())
        self._texts.register(connection)
        return connection

    def sql(self, query_text: str, timeout_seconds: float = SECONDS) -> duckdb.DuckDBPyRelation:
        """Return the rows that a select returns, as `reprise sql` does: it reads the run alone, and writes nothing.

        Raises ValueError if the query is wrong, is no select, or takes longer than the timeout.
        """
        return query(self.folder, query_text, timeout_seconds)

    def losses(self, round_number: int | None = None) -> duckdb.DuckDBPyRelation:
        """Return the losses of all samples after a round, or after every round that was scored.

        Columns: round, shard, sample, source, num_tokens, and loss in nats per token. Raises ValueError if the round
        was not scored.
        """
        ledger = self.ledger()
        scored = [number for (number,) in ledger.sql("select distinct round from losses order by round").fetchall()]
        if round_number is not None and round_number not in scored:
            known = f"give one of {', '.join(map(str, scored))}" if scored else "score round 1 first"
            raise ValueError(f"round_number: round {round_number} was not scored; {known}")
        condition = "true" if round_number is None else f"round = {round_number}"
        return ledger.sql(
            f"""select round, shard, sample, source, losses.num_tokens, loss
            from losses join samples using (shard, sample) where {condition} order by round, shard, sample"""
        )

    def scores(self) -> duckdb.DuckDBPyRelation:
        """Return the scores of each round's final model in evaluation tasks: the view final_scores, in order."""
        return self.ledger().sql("from final_scores order by round, task, metric")

    def samples(
        self,
        order: str = "hardest",
        count: int = 20,
        *,
        where: str | None = None,
        source: str | None = None,
        scored_round: int | None = None,
    ) -> list[Sample]:
        """Return at most `count` samples with their texts, as `reprise samples` shows them.

        order: hardest, easiest, dropped, forgotten, typical, or all. where: a DuckDB condition; docs/samples.md has the
        columns. source: only its samples. scored_round: the round after which losses were measured (default: the last).
        Raises ValueError if there is no such order, source or round, or the condition is wrong.
        """
        return find_samples(self.folder, order, count, where=where, source=source, scored_round=scored_round).samples

    def text(self, shard: int, sample: int) -> str:
        """Return the text of a sample; the shard of validation samples is -1. Raises ValueError if there is none."""
        [text] = self._texts.texts([shard], [sample])
        return text

    def resume(self) -> "StartedRun":
        """Start what is left of the run in a process of its own; see `start_run`."""
        return start_run(self.folder)


class StartedRun:
    """A run in a process of its own, `reprise run`, which goes on if this process ends."""

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        """Start `reprise run` with `arguments`, which make the run in `folder`."""
        self.folder = folder
        # A file, since nobody reads a pipe while the caller is busy; deleted when it is closed.
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as this object
        self._num_shown = 0
        # Of the notebook, and not installed for other programs.
        environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "flows.cli.main", "run", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            # Ctrl-C and the interrupt of a notebook do not reach it, but `wait`.
            start_new_session=True,
            env={**environment, "PYTHONUNBUFFERED": "1"},
        )

    def is_running(self) -> bool:
        """Return whether the process has not ended yet."""
        return self._process.poll() is None

    def wait(self, timeout_seconds: float | None = None, *, shows_output: bool = False) -> OpenRun:
        """Return the run once it is complete.

        shows_output: print what `reprise run` prints, such as progress, on standard error. Raises RunFailedError if the
        run ends without completing, and TimeoutError, while the run goes on, after the timeout. A KeyboardInterrupt
        stops the run, as it does `reprise run`.
        """
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        try:
            while self.is_running():
                if shows_output:
                    self._show()
                if deadline is not None and time.monotonic() > deadline:
                    raise TimeoutError(f"{self.folder}: not complete after {timeout_seconds:g} s; it goes on")
                time.sleep(_SECONDS_BETWEEN_LOOKS)
        except KeyboardInterrupt:
            self.stop()
            raise
        if shows_output:
            self._show()
        if self._process.returncode != 0:
            raise RunFailedError(self._failure())
        return OpenRun(self.folder)

    def stop(self) -> None:
        """Stop the run as Ctrl-C does, and wait for its end: ranks save a checkpoint from which it can be resumed."""
        if self.is_running():
            self._process.send_signal(signal.SIGINT)
        self._process.wait()

    def _show(self) -> None:
        text = self._read(self._num_shown)
        # Whole lines only.
        complete, newline, _ = text.rpartition(b"\n")
        self._num_shown += len(complete + newline)
        sys.stderr.write((complete + newline).decode(errors="replace"))

    def _read(self, start: int) -> bytes:
        """Return the output from byte `start` on; the position at which the process writes stays."""
        size = os.fstat(self._output.fileno()).st_size
        return os.pread(self._output.fileno(), size - start, start)

    def _failure(self) -> str:
        """Return why the process ended, from the last lines of its output."""
        lines = self._read(0).decode(errors="replace").splitlines() or ["no output"]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        status = self._process.returncode
        if status < 0:
            return f"{self.folder}: ended by {signal.Signals(-status).name}; start it again to resume"
        return errors[-1] if errors else f"{self.folder}: {lines[-1]}"


def open_run(folder: Path | str) -> OpenRun:
    """Return the run in `folder`. Raises ValueError if it is not a run folder."""
    return OpenRun(expand_home(str(folder)))


def list_runs(folder: Path | str = "runs") -> list[RunStatus]:
    """Return the status of every run in a folder of run folders, by name; none if there is no run.

    A run that cannot be read has the state `unreadable`, and an error.
    """
    place = expand_home(str(folder))
    return read_run_statuses(place) if any(place.glob("[!.]*/run.yaml")) else []


def start_run(target: Path | str, overrides: Mapping[str, Any] | None = None) -> StartedRun:
    """Start a run, or resume it, in a process of its own, and return at once.

    target: a YAML configuration, or a run folder to resume. overrides: fields of the configuration, such as
    {"name": "other", "refine.sampling_rate": 0.3}; a run folder takes none. The process is `reprise run`, and the same
    locks, checks and errors apply. Raises ValueError if the configuration is invalid.
    """
    place = expand_home(str(target)).absolute()
    sets = [f"{name}={_as_yaml(name, value)}" for name, value in (overrides or {}).items()]
    if not place.is_dir():
        folder = read_config(place, sets).folder.absolute()
    elif sets:
        raise ValueError("overrides: need a configuration file, not a run folder; give the file")
    else:
        folder = read_run(place).folder
    return StartedRun(folder, [str(place), *(part for each in sets for part in ("--set", each))])


def _as_yaml(name: str, value: Any) -> str:
    """Return a value as YAML on one line. Raises ValueError if it is no plain value."""
    plain = str(value) if isinstance(value, Path) else value
    try:
        # In a list, since a scalar alone would be followed by an end of document.
        text = yaml.safe_dump([plain], default_flow_style=True, allow_unicode=True, width=1 << 30)
    except yaml.YAMLError:
        raise ValueError(
            f"overrides: {name}: {value!r} is no plain value; give numbers, texts, lists and dictionaries of them"
        ) from None
    return text.strip()[1:-1]
