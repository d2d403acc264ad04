"""Prefect flow of the architecture search: one corpus, and tasks that train, evaluate and time each trial.

As in `flows.pipeline`, the folder shows what is complete. Tasks are called in the project's own threads, not submitted:
when a flow is cancelled, submitted tasks stop late and without cleaning up.
"""

from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from prefect import State, flow, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Cancelled

from data_scoring.base.progress import Progress
from flows.experiments import sweep
from flows.experiments.search_space import SearchConfig
from flows.experiments.sweep_report import write_sweep_report
from flows.experiments.sweep_results import read_trials, write_views
from flows.experiments.trials import TRIAL_ERRORS, check_trained, named, run_all, run_trial
from flows.orchestration.flow_progress import FlowProgress, RunCancelledError, allowed_folders
from flows.planning.auto import resolve_auto
from flows.run.allowed_paths import check_paths
from flows.run.config import RunConfig
from flows.run.folder import Run
from flows.run.locks import locked

prepare = task(name="prepare", task_run_name="prepare", cache_policy=NO_CACHE)(sweep.begin)
train = task(name="train", task_run_name="train {config.name}", cache_policy=NO_CACHE)(run_trial)
score = task(name="evaluate", task_run_name="evaluate {config.name}", cache_policy=NO_CACHE)(sweep.score)
measure = task(name="measure", task_run_name="measure {config.name}", cache_policy=NO_CACHE)(sweep.measure)
report = task(name="report", task_run_name="report", cache_policy=NO_CACHE)(write_sweep_report)

_DEFAULT = RunConfig()
_SEARCH = SearchConfig()


@flow(name="sweep", flow_run_name="sweep {config.run_name}")
def architecture_sweep(config: RunConfig = _DEFAULT, search: SearchConfig = _SEARCH) -> Path | State[Any]:
    """Return the path of the results, after training models of one size that differ in depth, width and expansion."""
    if allowed := allowed_folders():
        check_paths(config, allowed)
    config, _ = resolve_auto(config)
    folder = sweep.sweep_folder(config)
    try:
        with FlowProgress(folder) as progress, locked(folder):
            corpus = prepare(config, search, progress)
            trials = sweep.plan(config, search, corpus.corpus().vocab_size)
            write_views(folder)
            work = {str(trial.name): partial(_train, trial, corpus, progress) for trial in trials}
            run_all(work, search.jobs, "training (trials)", progress)
            # One at a time, after all training: anything that runs concurrently would distort the measurement.
            for trial in trials if search.generation else []:
                _measure(trial, progress)
            page = report(folder, config)
            rows = read_trials(folder)
            progress.tried(rows, page)
            check_trained(rows, page.page)
            return page.page
    except RunCancelledError as error:
        return Cancelled(message=str(error))


def _train(trial: RunConfig, corpus: Run, reporter: FlowProgress, progress: Progress) -> None:
    """Train a trial. A failure is recorded in the trial's row and does not stop the others."""
    with suppress(*TRIAL_ERRORS):
        train(trial, corpus, progress)
        if trial.eval.asked:
            score(trial, progress)
    reporter.tried(read_trials(trial.folder.parent))


def _measure(trial: RunConfig, reporter: FlowProgress) -> None:
    with suppress(*TRIAL_ERRORS):
        measure(trial, named(trial, reporter))
    reporter.tried(read_trials(trial.folder.parent))
