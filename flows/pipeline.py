"""Prefect flows of a run: prepare a corpus, then mix, train, score and refine in rounds, and write a report.

`flows.stages.stage_order` lists the stages in order. Each task completes one stage, unless the run folder shows that
it is complete. A restarted flow therefore resumes where the last one stopped, independent of Prefect's own state.
"""

from pathlib import Path
from typing import Annotated, Any

from prefect import State, flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Cancelled
from pydantic import Field

from data_scoring.config import EvalConfig
from data_scoring.refine.refine_config import RefineConfig
from flows.launch.launcher import KeptRanks
from flows.orchestration.approval import ask
from flows.orchestration.flow_progress import FlowProgress, RunCancelledError, allowed_folders
from flows.planning.auto import resolve_auto
from flows.report.run_report import write_report
from flows.report.tables import evaluation_page, summary
from flows.run.allowed_paths import check_path, check_paths, check_section
from flows.run.config import RunConfig
from flows.run.folder import Run, open_run, read_run
from flows.run.locks import locked
from flows.stages import stage_order
from flows.stages.changes import check_changes
from flows.stages.evaluate import evaluate_otherwise
from flows.stages.refine import preview
from flows.stages.stage_order import keeps_ranks, stages_of, steps_of, with_next
from flows.tracking.followers import followed

complete = task(cache_policy=NO_CACHE)(stage_order.complete)
report = task(name="report", task_run_name="report", cache_policy=NO_CACHE)(write_report)

_DEFAULT = RunConfig()
Round = Annotated[int, Field(ge=1, le=100, description="Number of the round, from 1.")]
RefinedRound = Annotated[
    int, Field(ge=2, le=100, description="Number of the round that would train on the kept samples.")
]


@flow(name="multi-round", flow_run_name="{config.run_name}")
def multi_round(config: RunConfig = _DEFAULT) -> Path | State[Any]:
    """Return the path of the report, after training in rounds, each on samples selected by the losses of the last."""
    if allowed := allowed_folders():
        check_paths(config, allowed)
    config, reasons = resolve_auto(config)
    for reason in reasons:
        get_run_logger().info("auto: %s", reason)
    try:
        with FlowProgress(config.folder) as progress, locked(config.folder), KeptRanks() as kept:
            run = open_run(config, check_changes)
            with followed(run):
                for step, following in with_next(steps_of(config)):
                    if step.stage.waits_for(run, step.round_number) and ask(run, step.round_number):
                        # The approval may have changed the policy or the rate.
                        _complete(run, "refine", step.round_number, progress)
                    _complete(run, step.stage.name, step.round_number, progress, kept)
                    if not keeps_ranks(config, following):
                        kept.close()
                stages_of(run).verify(progress)
                return report(run)
    except RunCancelledError as error:
        return Cancelled(message=str(error))


@flow(name="score-shards", flow_run_name="score {run_folder}")
def score_shards(run_folder: str, round_number: Round = 1) -> State[Any] | None:
    """Score all shards with the final model of a round of an existing run, unless that is done."""
    run = _open(run_folder)
    try:
        with FlowProgress(run.folder) as progress, locked(run.folder):
            _complete(run, "score", round_number, progress)
    except RunCancelledError as error:
        return Cancelled(message=str(error))
    return None


@flow(name="evaluate", flow_run_name="evaluate {run_folder}")
def evaluate_tasks(
    run_folder: str,
    round_number: Round = 1,
    evaluation: EvalConfig = EvalConfig(tasks=("paper",)),  # noqa: B008
) -> str | State[Any]:
    """Return the paper's table as Markdown, after evaluating the final model of a round of an existing run."""
    run = _open(run_folder)
    if allowed := allowed_folders():
        check_section(evaluation, "evaluation.", allowed)
    try:
        with FlowProgress(run.folder) as progress, locked(run.folder):
            evaluate_otherwise(stages_of(run), round_number, evaluation, progress)
            page = evaluation_page(run)
    except RunCancelledError as error:
        return Cancelled(message=str(error))
    create_markdown_artifact(page, key=f"evaluation-round-{round_number}", description=f"{run_folder}: task scores")
    return page


@flow(name="refine", flow_run_name="refine {run_folder}, dry run")
def refine_dry_run(
    run_folder: str,
    round_number: RefinedRound = 2,
    refine: RefineConfig = RefineConfig(),  # noqa: B008
) -> str:
    """Return, as Markdown, what refining would keep for a round of an existing run; the run is not changed."""
    run = _open(run_folder)
    if (allowed := allowed_folders()) and refine.reference is not None:
        check_path("refine.reference", refine.reference, allowed)
    stages_of(run).require("score", round_number - 1)
    stages_of(run).verify()
    page = summary(preview(run, round_number, refine))
    create_markdown_artifact(
        page, key=f"dry-run-round-{round_number}", description=f"{run_folder}: nothing was written"
    )
    return page


def _open(run_folder: str) -> Run:
    if allowed := allowed_folders():
        check_path("run_folder", run_folder, allowed)
    return read_run(Path(run_folder))


def _complete(run: Run, stage: str, round_number: int, progress: FlowProgress, kept: KeptRanks | None = None) -> None:
    """Complete a stage as a separate task, and show its result."""
    name = f"{stage}-{round_number}" if round_number else stage
    complete.with_options(name=stage, task_run_name=name)(run, stage, round_number, progress, kept)
    progress.completed(run, stage, round_number)
