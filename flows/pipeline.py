"""The whole job, as Prefect runs it: corpus, then rounds of train, score, refine, and a report.

Every task wraps a plain function of `flows.stages` that looks into the run folder first and skips what is complete:
a flow that is run again goes on where the last one stopped, whatever Prefect remembers of it.
"""

from pathlib import Path

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows import stages
from flows.config import RunConfig
from flows.progress import TerminalProgress
from flows.run_folder import locked, open_run

prepare = task(name="prepare", cache_policy=NO_CACHE)(stages.prepare)
mix = task(name="mix", task_run_name="mix-{round_number}", cache_policy=NO_CACHE)(stages.mix)
train = task(name="train", task_run_name="train-{round_number}", cache_policy=NO_CACHE)(stages.train)
score = task(name="score", task_run_name="score-{round_number}", cache_policy=NO_CACHE)(stages.score)
refine = task(name="refine", task_run_name="refine-{round_number}", cache_policy=NO_CACHE)(stages.refine)
report = task(name="report", cache_policy=NO_CACHE)(stages.report)


@flow(name="multi-round", flow_run_name="{config.name}")
def multi_round(config: RunConfig) -> Path:
    """Train in rounds, each on what the one before left to learn; return the path of the report."""
    with locked(config.folder), TerminalProgress() as progress:
        run = open_run(config)
        prepare(run, progress)
        for round_number in range(1, config.rounds.num_rounds + 1):
            if round_number > 1:
                score(run, round_number - 1, progress)
                refine(run, round_number, progress)
            mix(run, round_number, progress)
            train(run, round_number, progress)
        path: Path = report(run)
        return path
