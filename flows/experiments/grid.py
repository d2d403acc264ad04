"""A grid of batch sizes and learning rates: every cell trains one round on the same number of tokens.

The learning rate of a cell is (batch / base_tokens)^r x base_lr (arXiv 2402.02791,
"Batchsize & Learning Rate").
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data_scoring.base.progress import Progress
from data_scoring.ledger import open_ledger
from flows.display.result_page import Page
from flows.experiments.grid_curves import Curve
from flows.experiments.grid_report import write_grid_report
from flows.experiments.trials import (
    TRIAL_ERRORS,
    Trial,
    check_trained,
    prepare_corpus,
    read_result,
    run_all,
    run_trial,
    trial_config,
    with_tokens,
)
from flows.run.config import RunConfig
from flows.run.folder import Run
from flows.run.locks import locked
from trainer.config import ScaledLr


@dataclass(frozen=True)
class Grid:
    """The cells of a grid: batch sizes in tokens, increment rates, seeds, and the tokens of each trial (None: all)."""

    batches: tuple[int, ...]
    rates: tuple[float, ...]
    num_seeds: int = 1
    tokens: int | None = None
    jobs: int = 1


def base_rule(config: RunConfig) -> ScaledLr:
    """Return the rule that the grid varies: the configuration's own, or its learning rate at its batch size."""
    train = config.train
    if isinstance(train.lr, ScaledLr):
        return train.lr
    batch_tokens = config.resolved_train.global_batch_size * config.corpus.seq_length
    return ScaledLr(base_lr=train.lr, base_tokens=batch_tokens)


def train_grid(config: RunConfig, grid: Grid, progress: Progress) -> Page:
    """Train every cell of `grid` for each seed from `config.seed` upward, and return the page of results.

    Complete trials are not repeated. A trial that fails, for example by diverging, is recorded as failed, and the
    others continue. Raises ValueError, one line per mistake, if the layout does not support a batch size.
    """
    config = with_tokens(config, grid.tokens)
    folder = config.folder.absolute().with_name(f"{config.run_name}-grid")
    seeds = range(config.seed, config.seed + grid.num_seeds)
    # Mistakes in any cell are reported before the first one trains.
    cells = _cells(config, grid, folder)
    with locked(folder):
        corpora = {seed: prepare_corpus(config, folder, f"corpus-seed-{seed}", seed, progress) for seed in seeds}
        work: dict[str, Callable[[Progress], None]] = {}
        for trial in cells.values():
            for seed, corpus in corpora.items():
                run_config = _run_config(config, folder, trial, seed)
                work[str(run_config.name)] = partial(_try, run_config, corpus)
        run_all(work, grid.jobs, "training (trials)", progress)
        rows = {
            cell: [read_result(_run_config(config, folder, trial, seed)) for seed in seeds]
            for cell, trial in cells.items()
        }
        curves = {
            cell: [_read_curve(_run_config(config, folder, trial, seed)) for seed in seeds]
            for cell, trial in cells.items()
        }
        page = write_grid_report(folder / "grid.html", config, base_rule(config), rows, curves)
    check_trained([row for of_cell in rows.values() for row in of_cell], page.page)
    return page


def _cells(config: RunConfig, grid: Grid, folder: Path) -> dict[tuple[int, float], Trial]:
    """Return the trial of each batch size and increment rate. Raises ValueError, one line per impossible cell."""
    rule = base_rule(config)
    cells, mistakes = {}, []
    for batch in grid.batches:
        for rate in grid.rates:
            # At the rule's own batch size the increment rate has no effect, so all cells share one trial.
            lr = rule.model_copy(update={"increment_rate": grid.rates[0] if batch == rule.base_tokens else rate})
            train = {"global_batch_tokens": batch, "lr": lr.model_dump(), "min_lr": None}
            trial = Trial(f"batch-{batch}-rate-{lr.increment_rate:g}", {"train": train})
            try:
                _run_config(config, folder, trial, config.seed)
            except ValueError as error:
                mistakes.append(f"--batch-tokens {batch}: {str(error).partition(': ')[2]}")
            cells[batch, rate] = trial
    if mistakes:
        raise ValueError("\n".join(dict.fromkeys(mistakes)))
    return cells


def _run_config(config: RunConfig, folder: Path, trial: Trial, seed: int) -> RunConfig:
    return trial_config(config, folder, Trial(f"{trial.name}-seed-{seed}", trial.values), seed)


def _read_curve(config: RunConfig) -> Curve:
    """Return the tokens trained on and the loss of each step of a trial; of a failed one, as far as it came."""
    with open_ledger(config.folder) as ledger:
        steps = ledger.sql(
            """select sum(num_tokens) over (order by step)::double as tokens, loss::double as loss from steps
            order by step"""
        ).fetchnumpy()
    return steps["tokens"], steps["loss"]


def _try(config: RunConfig, corpus: Run, progress: Progress) -> None:
    with suppress(*TRIAL_ERRORS):
        run_trial(config, corpus, progress)
