"""Trials: runs of one round over a corpus that they share, trained several at once, each leaving a row of results.

A trial's folder is a run folder like any other. Its row is a Parquet file of its own beside what it was made from, so
that trials need not know of each other, and views over the rows can be looked at while they go on.
"""

import contextvars
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_scoring.base.files import commit
from data_scoring.base.parquet import parquet_fingerprint, write_parquet
from data_scoring.base.progress import Progress
from data_scoring.ledger import query
from data_scoring.refine.near_duplicates import SCRATCH
from flows.evaluation.results import SCORE
from flows.run.config import RunConfig, parse_config
from flows.run.folder import Run, open_run
from flows.run.locks import locked
from flows.run.rank_errors import RanksFailedError
from flows.stages.stage_order import complete, fingerprint_of, steps_to_train

# What ends one trial and says nothing about the others.
TRIAL_ERRORS = (ValueError, RanksFailedError)

_SECONDS_BETWEEN_LOOKS = 0.5

# One row a trial. Losses are validation losses at the end; scores and generation_speed are null until they were
# measured.
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
    """One trial: its name, which its folder has too, the fields that it sets, by section, and its last round."""

    name: str
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    num_rounds: int = 1


class TrialStoppedError(Exception):
    """A trial was told to stop, because whoever asked for all of them was."""


def trial_config(config: RunConfig, folder: Path, trial: Trial, seed: int) -> RunConfig:
    """Return the configuration of a trial's run, in `folder`. Raises ValueError where its fields do not go together."""
    values = config.model_dump()
    values |= {"name": trial.name, "output": str(folder), "seed": seed}
    values["rounds"] |= {"num_rounds": trial.num_rounds, "approval": False}
    for section, fields in trial.values.items():
        values[section] |= fields
    return parse_config(values, f"trial {trial.name}")


def with_tokens(config: RunConfig, tokens: int | None) -> RunConfig:
    """Return `config` with round 1 training on `tokens`, if given. Raises ValueError where that cannot be."""
    if tokens is None:
        return config
    values = config.model_dump()
    values["train"]["max_tokens"] = tokens
    return parse_config(values, "--tokens")


def check_trained(rows: list[dict[str, Any]], page: Path) -> None:
    """Raise RanksFailedError where none of the trials in `rows` has trained."""
    if not any(row["state"] == "trained" for row in rows):
        raise RanksFailedError(f"no trial was trained ({page}); the first said: {rows[0]['reason']}")


def prepare_corpus(config: RunConfig, folder: Path, name: str, seed: int, progress: Progress) -> Run:
    """Return the run called `name` in `folder` that does nothing but have the corpus that trials of `seed` share.

    Raises ValueError where it was made by another configuration, or where every trial would wait for
    hosts to join it.
    """
    if config.launch.launcher_kind.is_joined and config.launch.nodes > 1:
        raise ValueError(
            f"launch.nodes: {config.launch.nodes} hosts would have to join every trial one by one; take one host, or "
            "launch.kind slurm"
        )
    base = trial_config(config, folder, Trial(name), seed)
    with locked(base.folder):
        run = open_run(base)
        for step in steps_to_train(base, 1):
            if step.round_number == 0:
                complete(run, step.stage.name, 0, progress)
    return run


def train_trial(config: RunConfig, corpus: Run, progress: Progress) -> Run:
    """Return the trial's run, its one round trained over the corpus of the run `corpus`."""
    with locked(config.folder):
        share(corpus.corpus_folder, config.folder / "corpus")
        run = open_run(config)
        for step in steps_to_train(config, 1):
            complete(run, step.stage.name, step.round_number, progress)
    return run


def run_trial(config: RunConfig, corpus: Run, progress: Progress) -> None:
    """Train a trial and write its row, or do nothing where both were done.

    Raises one of TRIAL_ERRORS, which is then on record in its row, where it fails; another call tries it again.
    """
    path = result_path(config)
    try:
        run = train_trial(config, corpus, progress)
        fingerprint = fingerprint_of(run, "train", 1)
        if parquet_fingerprint(path) != fingerprint:
            _write(path, {**_settings(config, corpus.corpus().vocab_size), **_results(run)}, fingerprint)
    except TRIAL_ERRORS as error:
        # The row of a trial that has trained stays.
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
    [(num_steps, num_tokens, seconds)] = query(
        run.folder, "select count(*), sum(num_tokens), sum(num_tokens / tokens_per_second) from steps where round = 1"
    ).fetchall()
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
    """Return a row for each source: its validation loss at the end of a round, and over how many tokens."""
    last = f"select * from validation where round = {round_number} qualify step = max(step) over ()"
    rows = query(run.folder, f"select source, loss, num_tokens from ({last}) order by source").fetchall()
    return [dict(zip(("source", "loss", "num_tokens"), row, strict=True)) for row in rows]


def named(config: RunConfig, progress: Progress) -> Progress:
    """Return `progress` such that it says what of a trial is done with the trial's name before it."""
    return lambda what, done, total: progress(f"{config.name}: {what}", done, total)


def run_all(work: Mapping[str, Callable[[Progress], None]], jobs: int, what: str, progress: Progress) -> None:
    """Do all pieces of named `work`, `jobs` at once; `progress` is told of all of them together as `what`.

    Each runs in a thread, with the context of the caller. Where one raises anything, or this thread is interrupted, or
    `progress` raises, the others are stopped within a second through the progress that they are given, and the error
    is raised.
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
    """What each piece of work that goes on says of itself."""

    def __init__(self) -> None:
        self.is_stopped = False
        self._lines: dict[str, str] = {}

    def progress(self, name: str) -> Progress:
        """Return the progress of the work `name`, which raises TrialStoppedError once everything is to stop."""

        def note(what: str, done: int, total: int | None) -> None:
            if self.is_stopped:
                raise TrialStoppedError(f"{name} was stopped")
            share = f" {done / total:.0%}" if total else ""
            self._lines[name] = f"{name}: {what.partition(' · ')[0]}{share}"

        return note

    def clear(self, name: str) -> None:
        """Forget the work `name`."""
        self._lines.pop(name, None)

    def lines(self) -> list[str]:
        """Return a line for each piece of work that goes on."""
        return list(self._lines.values())


def share(source: Path, target: Path) -> None:
    """Make the folder `target` hold what the finished folder `source` does, at once, by hard links where it can.

    Files of a run are replaced and never changed, so neither side sees what the other does later.
    """
    if target.exists():
        return
    temporary = target.with_name(f".{target.name}.sharing")
    shutil.rmtree(temporary, ignore_errors=True)
    notes = shutil.ignore_patterns(".told-*", ".*.tmp", SCRATCH)
    shutil.copytree(source, temporary, symlinks=True, ignore=notes, copy_function=_link)
    commit(temporary, target)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        # Another file system, or one that has no links.
        shutil.copy2(source, target)
