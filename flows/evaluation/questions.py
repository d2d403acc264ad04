"""The questions of an evaluation: the items of tasks, and the requests that ranks answer."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_scoring.base.progress import Progress
from data_scoring.config import EvalConfig
from data_scoring.evaluation.items import ItemText, evaluation_texts
from data_scoring.evaluation.tasks import TASKS, other_tasks, resolve_names
from flows.evaluation.task_index import check_names, explaining
from flows.run.folder import Run
from trainer.jobs import Evaluation
from trainer.requests import requests_path, write_requests

if TYPE_CHECKING:
    from flows.evaluation.harness_requests import Asked
    from flows.evaluation.harness_task import Fits
    from flows.evaluation.task_loading import EvaluationTask


@dataclass(frozen=True)
class Question:
    """A task and all its requests."""

    task: "EvaluationTask"
    asked: "Asked"


def check_items(config: EvalConfig) -> None:
    """Raise ValueError, in one line, if a file that the tasks need is missing or broken."""
    from flows.evaluation.task_loading import load_tasks

    names = resolve_names(config.asked)
    # Cheap, and first.
    check_names(names)
    own = [name for name in names if name in TASKS]
    tasks = load_tasks(own, data_of(config), config.limit, _fits_all, _one_token_each)
    for name in other_tasks(names):
        tasks += _load_open(name, config, _fits_all)
    _check_distinct(tasks)


def evaluation_folder(run: Run, round_number: int) -> Path:
    """Return the folder of the answers and scores of a round's models."""
    return run.round_folder(round_number) / "evaluation"


def read_questions(run: Run, names: Sequence[str], config: EvalConfig, progress: Progress) -> list[Question]:
    """Return the questions of the named tasks, after writing their requests for the ranks.

    Raises ValueError, in one line, for an unknown task, and for a file that is missing or broken.
    """
    # Importing lm-eval takes seconds, so import it only for evaluations.
    from flows.evaluation.harness_model import open_reader
    from flows.evaluation.harness_requests import ask
    from flows.evaluation.task_loading import load_tasks

    reader, resolved = open_reader(run), resolve_names(names)

    def count_tokens(texts: Sequence[str]) -> list[int]:
        return list(map(len, reader.tokenizer.encode_batch(list(texts))))

    questions = []
    for number, name in enumerate(resolved):
        progress("reading evaluation tasks", number, len(resolved))
        if name in TASKS:
            tasks = load_tasks([name], data_of(config), config.limit, reader.fits, count_tokens)
        else:
            tasks = _load_open(name, config, reader.fits)
        for task in tasks:
            with explaining(task.name, "asked") if task.entry else nullcontext():
                question = Question(task, ask(task, reader))
                if question.asked.unscorable:
                    # A task's scores are over the items that it asks for.
                    left = task.without(question.asked.unscorable)
                    question = Question(left, ask(left, reader))
            write_requests(requests_path(requests_folder(run), task.name), question.asked.requests)
            questions.append(question)
    _check_distinct([question.task for question in questions])
    progress("reading evaluation tasks", len(resolved), len(resolved))
    return questions


def _load_open(name: str, config: EvalConfig, fits: "Fits") -> "list[EvaluationTask]":
    from flows.evaluation.open_task_loading import load_open_tasks

    return load_open_tasks(name, data_of(config), config.limit, fits)


def _check_distinct(tasks: "Sequence[EvaluationTask]") -> None:
    """Raise ValueError if two entries of `eval.tasks` stand for the same task."""
    entries: dict[str, str] = {}
    for task in tasks:
        if task.name in entries:
            raise ValueError(
                f"eval.tasks: {entries[task.name]} and {task.entry or task.name} both have the task {task.name!r}; "
                "leave one out, or rename the task"
            )
        entries[task.name] = task.entry or task.name


def item_texts(run: Run) -> Iterator[ItemText]:
    """Yield the text of every item of the run's tasks, including in-training evaluation, for finding overlaps."""
    from flows.evaluation.task_loading import load_tasks, task_texts

    config = run.config.eval
    names, data = resolve_names(config.asked), data_of(config)
    own = [name for name in names if name in TASKS]
    if data is not None:
        yield from evaluation_texts(own, data)
    else:
        yield from task_texts(load_tasks(own, None, config.limit, _fits_all, _one_token_each))
    for name in other_tasks(names):
        from flows.evaluation.open_task_loading import open_task_texts

        for task in _load_open(name, config, _fits_all):
            yield from open_task_texts(task)


def data_of(config: EvalConfig) -> Path | None:
    """Return the folder of the evaluation items, or None if they come from the hub."""
    return None if config.data is None else Path(config.data)


def _fits_all(context: str, continuations: Sequence[str]) -> bool:
    """Return True: without a model, there is no length limit."""
    return True


def _one_token_each(texts: Sequence[str]) -> list[int]:
    return [1] * len(texts)


def requests_folder(run: Run) -> Path:
    """Return the folder of the requests that ranks answer."""
    return run.folder / "evaluation"


def evaluation_of(run: Run, names: tuple[str, ...]) -> Evaluation:
    """Return the evaluation of the named tasks for a job; `read_questions` has written their requests."""
    end_of_document = run.config.tokenizer.end_of_document
    return Evaluation(requests=requests_folder(run), tasks=names, end_of_document=end_of_document)
