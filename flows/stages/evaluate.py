"""The stage `evaluate`: the task scores of a round's final model."""

import importlib.metadata
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_scoring.base.files import checksum
from data_scoring.base.progress import Progress
from data_scoring.base.user_paths import typed
from data_scoring.config import EvalConfig
from data_scoring.evaluation.items import item_files
from data_scoring.evaluation.task_files import files_of_task, is_task_path
from data_scoring.evaluation.tasks import TASKS, resolve_names
from flows.evaluation.rounds import RoundEvaluation
from flows.run.config import RunConfig
from flows.run.folder import Run
from flows.stages.stage import Stage, Stages

# Incremented when prompts, scores or their files change.
_FORMAT = 1


class Evaluate(Stage):
    """Evaluate a round's final model on the tasks of `eval.tasks`."""

    name = "evaluate"
    help = "evaluate models on tasks"

    def round_number(self, config: RunConfig, place: int) -> int | None:
        """Return every round, if the configuration names tasks."""
        return place if place and config.eval.asked else None

    def is_needed(self, config: RunConfig) -> bool:
        """Return False: no other stage needs task scores, which may be added after everything else is done."""
        return False

    def needs(self, config: RunConfig, round_number: int) -> list[tuple[str, int]]:
        """Return the round's training."""
        return [("train", round_number)]

    def inputs(self, stages: Stages, round_number: int) -> list[Any]:
        """Return the model, the tasks, and the files that they are read from."""
        config = stages.run.config.eval
        names = resolve_names(config.asked)
        own = [name for name in names if name in TASKS]
        files = [] if config.data is None else item_files(own, Path(config.data))
        prompts = importlib.metadata.version("lm_eval")
        for name in filter(is_task_path, names):
            # The evaluation tells of files that are missing or broken.
            with suppress(ValueError):
                files += files_of_task(Path(name))
        contents = [[path.name, checksum(path)] for path in files]
        written = tuple(map(typed, names))
        return [stages.fingerprint("train", round_number), _FORMAT, prompts, written, config.limit, contents]

    def files(self, run: Run, round_number: int) -> list[Path]:
        """Return nothing: answers and scores have a record in each step's folder (`flows.evaluation.rounds`)."""
        return []

    def can_follow_training(self, config: RunConfig) -> bool:
        """Return True: the answers are those of the model that was trained."""
        return True

    def work(self, stages: Stages, round_number: int, progress: Progress) -> None:
        """Answer the tasks on the run's ranks, and score the answers."""
        evaluation = RoundEvaluation(stages.run, round_number, stages.fingerprint("train", round_number))
        questions = evaluation.ask(stages.run.config.eval, progress, stages.kept)
        evaluation.score(questions, progress)


def evaluate_otherwise(stages: Stages, round_number: int, config: EvalConfig, progress: Progress) -> list[str]:
    """Evaluate a round's final model with `config` instead of the run's own configuration.

    Returns the run's own tasks that were scored on other items; their scores are recomputed by the stage `evaluate`.
    """
    run = stages.run
    stages.require("train", round_number)
    stages.verify(progress)
    evaluation = RoundEvaluation(run, round_number, stages.fingerprint("train", round_number))
    questions, own = evaluation.ask(config, progress), run.config.eval
    replaced: list[str] = []
    if (config.data, config.limit) != (own.data, own.limit):
        asked = resolve_names(own.asked)
        replaced = [
            question.task.name for question in questions if (question.task.entry or question.task.name) in asked
        ]
    if replaced:
        run.forget("evaluate", round_number)
    evaluation.score(questions, progress)
    return replaced
