"""The whole job, as Prefect runs it: corpus, then rounds of train, score, refine, and a report.

Every task wraps a plain function of `flows.stages` that looks into the run folder first and skips what is complete:
a flow that is run again goes on where the last one stopped, whatever Prefect remembers of it.
"""

from pathlib import Path
from typing import Annotated, Any

from prefect import State, flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Cancelled
from pydantic import Field

from data_scoring.config import EvalConfig, RefineConfig
from flows.orchestration.approval import ask
from flows.orchestration.flow_progress import Reporter, RunCancelledError, allowed_folders
from flows.report.tables import evaluation_page, summary
from flows.run.config import RunConfig, check_path, check_paths
from flows.run.folder import Run, open_run, read_run
from flows.run.locks import locked
from flows.stages import completion as stages

prepare = task(name="prepare", task_run_name="prepare", cache_policy=NO_CACHE)(stages.prepare)
contamination = task(name="contamination", task_run_name="contamination", cache_policy=NO_CACHE)(stages.contamination)
mix = task(name="mix", task_run_name="mix-{round_number}", cache_policy=NO_CACHE)(stages.mix)
inherit = task(name="inherit", task_run_name="inherit", cache_policy=NO_CACHE)(stages.inherit)
train = task(name="train", task_run_name="train-{round_number}", cache_policy=NO_CACHE)(stages.train)
evaluate = task(name="evaluate", task_run_name="evaluate-{round_number}", cache_policy=NO_CACHE)(stages.evaluate)
score = task(name="score", task_run_name="score-{round_number}", cache_policy=NO_CACHE)(stages.score)
refine = task(name="refine", task_run_name="refine-{round_number}", cache_policy=NO_CACHE)(stages.refine)
report = task(name="report", task_run_name="report", cache_policy=NO_CACHE)(stages.report)

_DEFAULT = RunConfig()
Round = Annotated[int, Field(ge=1, le=100, description="Number of the round, from 1.")]
RefinedRound = Annotated[int, Field(ge=2, le=100, description="Number of the round that would train on what is kept.")]


@flow(name="multi-round", flow_run_name="{config.run_name}")
def multi_round(config: RunConfig = _DEFAULT) -> Path | State[Any]:
    """Train in rounds, each on what the one before left to learn; return the path of the report."""
    if allowed := allowed_folders():
        check_paths(config, allowed)
    try:
        with Reporter(config.folder) as progress, locked(config.folder):
            run = open_run(config)
            prepare(run, progress)
            if config.eval.contamination != "off":
                contamination(run, progress)
            if config.model.inherits:
                inherit(run, progress)
                progress.inherited(run)
            for number in range(1, config.rounds.num_rounds + 1):
                if number > 1:
                    score(run, number - 1, progress)
                    progress.scored(run, number - 1)
                    refine(run, number, progress)
                    progress.refined(run, number)
                    if ask(run, number) and refine(run, number, progress):
                        progress.refined(run, number)
                mix(run, number, progress)
                train(run, number, progress)
                progress.trained(run, number)
                if config.eval.asked:
                    evaluate(run, number, progress)
                    progress.evaluated(run, number)
            return report(run)
    except RunCancelledError as error:
        return Cancelled(message=str(error))


@flow(name="score-shards", flow_run_name="score {run_folder}")
def score_shards(run_folder: str, round_number: Round = 1) -> State[Any] | None:
    """Score every shard under the model that a round of an existing run ended with, where that is not done yet."""
    run = _open(run_folder)
    try:
        with Reporter(run.folder) as progress, locked(run.folder):
            score(run, round_number, progress)
            progress.scored(run, round_number)
    except RunCancelledError as error:
        return Cancelled(message=str(error))
    return None


@flow(name="evaluate", flow_run_name="evaluate {run_folder}")
def evaluate_tasks(
    run_folder: str,
    round_number: Round = 1,
    evaluation: EvalConfig = EvalConfig(tasks=("paper",)),  # noqa: B008
) -> str | State[Any]:
    """Score the model that a round of an existing run ended with in tasks; return the paper's table as Markdown."""
    run = _open(run_folder)
    if (allowed := allowed_folders()) and evaluation.data is not None:
        check_path("evaluation.data", evaluation.data, allowed)
    try:
        with Reporter(run.folder) as progress, locked(run.folder):
            stages.evaluate_otherwise(run, round_number, evaluation, progress)
            page = evaluation_page(run)
    except RunCancelledError as error:
        return Cancelled(message=str(error))
    create_markdown_artifact(page, key=f"evaluation-round-{round_number}", description=f"{run_folder}: scores in tasks")
    return page


@flow(name="refine", flow_run_name="refine {run_folder}, dry run")
def refine_dry_run(
    run_folder: str,
    round_number: RefinedRound = 2,
    refine: RefineConfig = RefineConfig(),  # noqa: B008
) -> str:
    """Show what refining would keep for a round of an existing run, writing nothing to it; return it as Markdown."""
    run = _open(run_folder)
    if (allowed := allowed_folders()) and refine.reference is not None:
        check_path("refine.reference", refine.reference, allowed)
    page = summary(stages.preview(run, round_number, refine))
    create_markdown_artifact(
        page, key=f"dry-run-round-{round_number}", description=f"{run_folder}: nothing was written"
    )
    return page


def _open(run_folder: str) -> Run:
    if allowed := allowed_folders():
        check_path("run_folder", run_folder, allowed)
    return read_run(Path(run_folder))
