"""Trials: runs over a shared corpus, most of one round, trained concurrently, each with a row of results.

A trial's folder is an ordinary run folder. Its row is a Parquet file in that folder, so that trials are independent of
each other, and views over the rows can be read while trials are running.
"""

import contextvars
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_scoring.base.files import writing
from data_scoring.base.parquet import parquet_fingerprint, write_parquet
from data_scoring.base.progress import Progress
from data_scoring.ledger import read_rows
from flows.evaluation.results import SCORE
from flows.inheritance.initial_checkpoint import is_current
from flows.run.config import RunConfig, parse_config
from flows.run.errors import RanksFailedError
from flows.run.folder import VERIFIED, Run, open_run
from flows.run.locks import locked
from flows.run.sharing import share
from flows.stages.stage_order import complete, complete_all, fingerprint_of, stages_of, steps_to_train

# Errors that end one trial and do not affect the others.
TRIAL_ERRORS = (ValueError, RanksFailedError)

_SECONDS_BETWEEN_LOOKS = 0.5

# One row per trial. Losses are final validation losses; scores and generation_speed are null until they are measured.
TRIAL = pa.schema(
    [
        ("trial", pa.string()),
        ("state", pa.string()),
        ("reason", pa.string()),
        ("seed", pa.int64()),
        ("num_layers", pa.int32()),
        ("hidden_size", pa.int32()),
        ("num_attention_heads", pa.int32()),
        ("num_query_groups", pa.int32()),
        ("ffn_hidden_size", pa.int32()),
        ("expansion", pa.float64()),
        ("num_parameters", pa.int64()),
        ("batch_tokens", pa.int64()),
        ("lr", pa.float64()),
        ("increment_rate", pa.float64()),
        ("num_steps", pa.int64()),
        ("num_tokens", pa.int64()),
        ("seconds", pa.float64()),
        ("training_speed", pa.float64()),
        ("loss", pa.float64()),
        ("losses", pa.list_(pa.struct([("source", pa.string()), ("loss", pa.float64()), ("num_tokens", pa.int64())]))),
        ("generation_speed", pa.float64()),
        ("scores", pa.list_(SCORE)),
    ]
)


@dataclass(frozen=True)
class Trial:
    """One trial: its name (also its folder's), the fields that it sets, by section, and its number of rounds."""

    name: str
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    num_rounds: int = 1


class TrialStoppedError(Exception):
    """A trial was stopped because all trials are being stopped."""


def trial_config(config: RunConfig, folder: Path, trial: Trial, seed: int) -> RunConfig:
    """Return the configuration of a trial's run in `folder`. Raises ValueError if its fields are invalid together."""
    values = config.model_dump()
    values |= {"name": trial.name, "output": str(folder), "seed": seed}
    values["rounds"] |= {"num_rounds": trial.num_rounds, "approval": False}
    for section, fields in trial.values.items():
        values[section] |= fields
    return parse_config(values, f"trial {trial.name}", config.base)


def with_tokens(config: RunConfig, tokens: int | None) -> RunConfig:
    """Return `config` with round 1 limited to `tokens`, if given. Raises ValueError if that is invalid."""
    if tokens is None:
        return config
    values = config.model_dump()
    values["train"]["max_tokens"] = tokens
    return parse_config(values, "--tokens", config.base)


def check_trained(rows: list[dict[str, Any]], page: Path) -> None:
    """Raise RanksFailedError if none of the trials in `rows` has trained."""
    if not any(row["state"] == "trained" for row in rows):
        raise RanksFailedError(f"all trials failed ({page}); the first error: {rows[0]['reason']}")


def prepare_corpus(config: RunConfig, folder: Path, name: str, seed: int, progress: Progress) -> Run:
    """Return the run called `name` in `folder`, which only holds the corpus that the trials of `seed` share.

    Raises ValueError if it was created by another configuration, or if hosts would have to join each trial.
    """
    if config.launch.launcher_kind.is_joined and config.launch.nodes > 1:
        raise ValueError(
            f"launch.nodes: {config.launch.nodes} hosts would have to join each trial separately; set nodes: 1, or "
            "launch.kind: slurm or ray"
        )
    base = trial_config(config, folder, Trial(name), seed)
    with locked(base.folder):
        run = open_run(base)
        for step in steps_to_train(base, 1):
            if step.round_number == 0:
                complete(run, step.stage.name, 0, progress)
    return run


def train_trial(config: RunConfig, corpus: Run, progress: Progress) -> Run:
    """Return the trial's run, after training its rounds over the corpus of the run `corpus`.

    Raises ValueError if a larger model that it inherits from has changed since its training started.
    """
    with locked(config.folder):
        share_run(corpus, config.folder, ["corpus"], progress)
        run = open_run(config)
        complete_all(run, steps_to_train(config, config.rounds.num_rounds), progress)
    if config.model.inherits and not is_current(run):
        raise ValueError(
            f"{run.folder}: the larger model has changed since this run started; delete the folder, or restore the "
            "model"
        )
    return run


def run_trial(config: RunConfig, corpus: Run, progress: Progress) -> None:
    """Train a trial and write its row, unless both are done.

    Raises one of TRIAL_ERRORS if the trial fails; its row then records the error, and another call retries it.
    """
    path = result_path(config)
    try:
        run = train_trial(config, corpus, progress)
        fingerprint = fingerprint_of(run, "train", 1)
        if parquet_fingerprint(path) != fingerprint:
            _write(path, {**_settings(config, corpus.corpus().vocab_size), **_results(run)}, fingerprint)
    except TRIAL_ERRORS as error:
        # Keep the row of a trial that has trained.
        if not parquet_fingerprint(path):
            failure = {"state": "failed", "reason": str(error).splitlines()[0]}
            _write(path, {**_settings(config, corpus.corpus().vocab_size), **failure}, "")
        raise


def result_path(config: RunConfig) -> Path:
    """Return the path of a trial's row."""
    return config.folder / "trial.parquet"


def read_result(config: RunConfig) -> dict[str, Any]:
    """Return a trial's row."""
    [row] = pq.read_table(result_path(config)).to_pylist()
    return dict(row)


def add_result(config: RunConfig, **values: Any) -> None:
    """Set further columns of a trial's row."""
    path = result_path(config)
    _write(path, {**read_result(config), **values}, parquet_fingerprint(path) or "")


def _write(path: Path, row: dict[str, Any], fingerprint: str) -> None:
    write_parquet(path, pa.Table.from_pylist([row], TRIAL), fingerprint)


def _settings(config: RunConfig, vocab_size: int) -> dict[str, Any]:
    model, train, lr = config.model, config.resolved_train, config.train.lr
    return {
        "trial": config.run_name,
        "seed": config.seed,
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "ffn_hidden_size": model.ffn_size,
        "expansion": model.ffn_size / model.hidden_size,
        "num_parameters": model.num_parameters(model.vocab_size or vocab_size),
        "batch_tokens": train.global_batch_size * config.corpus.seq_length,
        "lr": train.lr,
        "increment_rate": None if isinstance(lr, float) else lr.increment_rate,
    }


def _results(run: Run) -> dict[str, Any]:
    [(num_steps, num_tokens, seconds)] = read_rows(
        run.folder, "select count(*), sum(num_tokens), sum(num_tokens / tokens_per_second) from steps where round = 1"
    )
    losses = final_losses(run, 1)
    total = sum(row["num_tokens"] for row in losses)
    return {
        "state": "trained",
        "num_steps": num_steps,
        "num_tokens": int(num_tokens),
        "seconds": seconds,
        "training_speed": int(num_tokens) / seconds,
        "loss": sum(row["loss"] * row["num_tokens"] for row in losses) / total,
        "losses": losses,
    }


def final_losses(run: Run, round_number: int) -> list[dict[str, Any]]:
    """Return a row for each source: its validation loss at the end of a round, and its number of tokens."""
    last = f"select * from validation where round = {round_number} qualify step = max(step) over ()"
    rows = read_rows(run.folder, f"select source, loss, num_tokens from ({last}) order by source")
    return [dict(zip(("source", "loss", "num_tokens"), row, strict=True)) for row in rows]


def named(config: RunConfig, progress: Progress) -> Progress:
    """Return `progress` with a trial's name before each message."""
    return lambda what, done, total: progress(f"{config.name}: {what}", done, total)


def run_all(work: Mapping[str, Callable[[Progress], None]], jobs: int, what: str, progress: Progress) -> None:
    """Do all pieces of named `work`, `jobs` at a time; reports them together to `progress` as `what`.

    Each runs in a thread, with the caller's context. If one raises, if this thread is interrupted, or if `progress`
    raises, the others are stopped within a second (the progress passed to them raises), and the error is raised.
    """
    board = _Board()

    def do(name: str, piece: Callable[[Progress], None]) -> None:
        try:
            piece(board.progress(name))
        finally:
            board.clear(name)

    with ThreadPoolExecutor(jobs) as pool:
        pending: set[Future[None]] = set()
        try:
            for name, piece in work.items():
                pending.add(pool.submit(contextvars.copy_context().run, partial(do, name, piece)))
            while pending:
                finished, pending = wait(pending, _SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
                for future in finished:
                    future.result()
                progress(" · ".join([what, *board.lines()]), len(work) - len(pending), len(work))
        except BaseException:
            board.is_stopped = True
            for future in pending:
                future.cancel()
            raise


class _Board:
    """The latest progress line of each running piece of work."""

    def __init__(self) -> None:
        self.is_stopped = False
        self._lines: dict[str, str] = {}

    def progress(self, name: str) -> Progress:
        """Return the progress of the work `name`, which raises TrialStoppedError after a stop."""

        def note(what: str, done: int, total: int | None) -> None:
            if self.is_stopped:
                raise TrialStoppedError(f"{name} was stopped")
            share = f" {done / total:.0%}" if total else ""
            self._lines[name] = f"{name}: {what.partition(' · ')[0]}{share}"

        return note

    def clear(self, name: str) -> None:
        """Remove the line of the work `name`."""
        self._lines.pop(name, None)

    def lines(self) -> list[str]:
        """Return a line for each running piece of work."""
        return list(self._lines.values())


def share_run(source: Run, target: Path, parts: Iterable[str], progress: Progress) -> None:
    """Copy parts of a finished run to the run folder `target` (see `share`), after verifying them.

    Raises ValueError if a file of the run is damaged.
    """
    stages_of(source).verify(progress)
    for part in parts:
        share(source.folder / part, target / part)
    # What the runs share on disk is not read again to verify it for each of them.
    if (source.folder / VERIFIED).exists() and not (target / VERIFIED).exists():
        with writing(target / VERIFIED) as temporary:
            shutil.copyfile(source.folder / VERIFIED, temporary)
