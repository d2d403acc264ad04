"""Evaluation of a run's models: what tasks ask, what a model answers at a round's end and on the way, what it scores.

`evaluation/` of the run folder holds the requests, a file a task, which all of its models are asked. A round's
`evaluation/step-<number>/` holds the answers after that step and, below scores/, items/ and unscorable/, what they are
worth: a file a task each, which the ledger's views of these names read.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from data_scoring.config import EvalConfig
from data_scoring.evaluation_items import evaluation_texts
from data_scoring.files import fingerprint
from data_scoring.item_ngrams import ItemText
from data_scoring.ledger import refresh_ledger
from data_scoring.progress import Progress
from data_scoring.scoring import write_parquet
from flows.evaluation_table import resolve_names
from flows.jobs import final_checkpoint
from flows.launch import launch
from flows.run_folder import Run
from trainer.checkpoint_folder import read_checkpoint_record
from trainer.jobs import Evaluation, RepeatedEvaluation
from trainer.requests import Answer, has_answers, identify_answers, read_answers, requests_path, write_requests

if TYPE_CHECKING:
    from flows.evaluation_requests import Asked
    from flows.evaluation_tasks import EvaluationTask

_SCORES = pa.schema(
    [
        ("is_end", pa.bool_()),
        ("task", pa.string()),
        ("subject", pa.string()),
        ("metric", pa.string()),
        ("score", pa.float64()),
        ("stderr", pa.float64()),
        ("chance", pa.float64()),
        ("num_items", pa.int64()),
        ("num_unscorable", pa.int64()),
        ("num_fewshot", pa.int32()),
        ("num_shortened", pa.int64()),
    ]
)
_ITEMS = pa.schema(
    [
        ("is_end", pa.bool_()),
        ("task", pa.string()),
        ("subject", pa.string()),
        ("item", pa.string()),
        ("score", pa.float64()),
    ]
)
# Folders beside answers, a file a task in each.
_WORTH = ("items", "unscorable", "scores")
_SECONDS_BETWEEN_LOOKS = 1.0
_UNSCORABLE = pa.schema([("task", pa.string()), ("item", pa.string()), ("reason", pa.string())])


@dataclass(frozen=True)
class Question:
    """A task, and all that it asks of a model."""

    task: "EvaluationTask"
    asked: "Asked"


def check_items(config: EvalConfig) -> None:
    """Raise ValueError, in one line, where what the tasks need is missing or broken; better known before training."""
    from flows.evaluation_tasks import load_tasks

    load_tasks(config.asked, _data(config), config.limit, _fits_all, _one_token_each)


def evaluation_folder(run: Run, round_number: int) -> Path:
    """Return the folder of what a round's models answered and scored."""
    return run.round_folder(round_number) / "evaluation"


def read_questions(run: Run, names: Sequence[str], config: EvalConfig, progress: Progress) -> list[Question]:
    """Return what the tasks of those names ask of the run's models, and write it down where ranks read it.

    Raises ValueError, in one line, for an unknown task, and for a file that is missing or broken.
    """
    # Importing lm-eval takes seconds, which who evaluates nothing need not wait.
    from flows.evaluation_model import open_reader
    from flows.evaluation_requests import ask
    from flows.evaluation_tasks import load_tasks

    reader, resolved = open_reader(run), resolve_names(names)

    def count_tokens(texts: Sequence[str]) -> list[int]:
        return list(map(len, reader.tokenizer.encode_batch(list(texts))))

    questions = []
    for number, name in enumerate(resolved):
        progress("reading evaluation tasks", number, len(resolved))
        [task] = load_tasks([name], _data(config), config.limit, reader.fits, count_tokens)
        question = Question(task, ask(task, reader))
        write_requests(requests_path(_requests_folder(run), name), question.asked.requests)
        questions.append(question)
    progress("reading evaluation tasks", len(resolved), len(resolved))
    return questions


def ask_round(run: Run, round_number: int, config: EvalConfig, progress: Progress) -> list[Question]:
    """Have the model that a round ended with answer the tasks of `config`, and return what they ask.

    A task whose answers are there is not asked again.
    """
    questions = read_questions(run, config.asked, config, progress)
    names = tuple(question.task.name for question in questions if question.asked.requests)
    # Where no item fits, say, there is nothing to ask.
    if names:
        _ask(run, final_checkpoint(run, round_number), names, _last_folder(run, round_number), progress)
    return questions


def score_answers(run: Run, round_number: int, questions: Sequence[Question], progress: Progress) -> None:
    """Score what the model that a round ended with has answered; right answers that were corrected count everywhere."""
    folder = _last_folder(run, round_number)
    for number, question in enumerate(questions):
        progress("scoring answers (tasks)", number, len(questions))
        _score(question, folder, is_end=True)
    progress("scoring answers (tasks)", len(questions), len(questions))
    score_training(run, round_number, questions, anew=True)
    refresh_ledger(run.folder)


def _last_folder(run: Run, round_number: int) -> Path:
    """Return the folder of what the model that a round ended with answers."""
    step = int(read_checkpoint_record(final_checkpoint(run, round_number))["step"])
    return evaluation_folder(run, round_number) / f"step-{step:08d}"


def _ask(run: Run, checkpoint: Path, names: tuple[str, ...], folder: Path, progress: Progress) -> None:
    """Have a checkpoint's model give the answers to tasks that are missing in `folder`."""
    from flows.evaluation_model import answer_job

    job = answer_job(run, checkpoint, evaluation_of(run, names), folder)
    requests = _requests_folder(run)
    is_complete = all(
        has_answers(requests_path(folder, name), identify_answers(job.fingerprint, requests_path(requests, name)))
        for name in names
    )
    if not is_complete:
        launch(job, run.folder, f"evaluate-{checkpoint.parent.parent.name}", progress, run.config.launch)


def training_questions(run: Run, progress: Progress) -> list[Question]:
    """Return what the run's models are asked while they train, as `eval.every_steps` has it."""
    config = run.config.eval
    if config.every_steps is None:
        return []
    return read_questions(run, config.training_tasks, config, progress)


def repeated_evaluation(run: Run, round_number: int, questions: Sequence[Question]) -> RepeatedEvaluation | None:
    """Return what ranks are told of `questions` that they ask their model every so many steps, or None of none."""
    every_steps = run.config.eval.every_steps
    if every_steps is None or not questions:
        return None
    names = tuple(question.task.name for question in questions if question.asked.requests)
    if not names:
        return None
    evaluation = evaluation_of(run, names)
    return RepeatedEvaluation(
        **evaluation.model_dump(), answers=evaluation_folder(run, round_number), every_steps=every_steps
    )


def forget_answers(run: Run, round_number: int, questions: Sequence[Question]) -> None:
    """Delete what models of a round answered and scored that this training would not: of other inputs, or to others."""
    for folder in evaluation_folder(run, round_number).glob("step-*"):
        known = {question.task.name for question in questions if _is_on_the_way(run, round_number, question, folder)}
        # What answers are worth goes before them, lest it stay without them.
        for place in [*(folder / kind for kind in reversed(_WORTH)), folder]:
            for path in place.glob("*.parquet"):
                if path.stem not in known:
                    path.unlink()


def scoring_on_the_way(run: Run, round_number: int, questions: Sequence[Question], progress: Progress) -> Progress:
    """Return `progress` for a round's training, which besides has answers scored soon after the model gave them."""
    folder, looked, known = evaluation_folder(run, round_number), 0.0, 0

    def note(what: str, done: int, total: int | None) -> None:
        nonlocal looked, known
        progress(what, done, total)
        if questions and time.monotonic() - looked > _SECONDS_BETWEEN_LOOKS:
            count, looked = len(list(folder.glob("step-*/*.parquet"))), time.monotonic()
            if count != known:
                score_training(run, round_number, questions)
                known = count

    return note


def score_training(run: Run, round_number: int, questions: Sequence[Question], anew: bool = False) -> None:
    """Score what a round's model answered on its way and has no scores yet; with `anew`, what has them as well."""
    scored = 0
    for folder in sorted(evaluation_folder(run, round_number).glob("step-*")):
        for question in questions:
            is_wanted = anew or not requests_path(folder / "scores", question.task.name).exists()
            if is_wanted and _is_on_the_way(run, round_number, question, folder):
                _score(question, folder, is_end=False)
                scored += 1
    if scored:
        refresh_ledger(run.folder)


def _is_on_the_way(run: Run, round_number: int, question: Question, folder: Path) -> bool:
    """Return whether `folder` has answers to these very requests that a round's training gave after its step."""
    requests, name = _requests_folder(run), question.task.name
    if not question.asked.requests:
        return False
    model = fingerprint(run.fingerprint("train", round_number), int(folder.name.removeprefix("step-")))
    return has_answers(requests_path(folder, name), identify_answers(model, requests_path(requests, name)))


def item_texts(run: Run) -> Iterator[ItemText]:
    """Yield the text of every item of the run's tasks, those during training as well, in which overlaps are sought."""
    from flows.evaluation_tasks import load_tasks, task_texts

    config = run.config.eval
    names, data = resolve_names(config.asked), _data(config)
    if data is not None:
        yield from evaluation_texts(names, data)
    else:
        yield from task_texts(load_tasks(names, None, config.limit, _fits_all, _one_token_each))


def _data(config: EvalConfig) -> Path | None:
    return None if config.data is None else Path(config.data)


def _fits_all(context: str, continuations: Sequence[str]) -> bool:
    """Return that a prompt fits: what is read is the items alone, for no model."""
    return True


def _one_token_each(texts: Sequence[str]) -> list[int]:
    return [1] * len(texts)


def _requests_folder(run: Run) -> Path:
    return run.folder / "evaluation"


def evaluation_of(run: Run, names: tuple[str, ...]) -> Evaluation:
    """Return what ranks are told of tasks of those names, whose requests `read_questions` has written."""
    end_of_document = run.config.tokenizer.end_of_document
    return Evaluation(requests=_requests_folder(run), tasks=names, end_of_document=end_of_document)


def _score(question: Question, folder: Path, is_end: bool) -> None:
    """Write what the answers in `folder` to a task are worth; anew each time, for right answers may be corrected."""
    name = question.task.name
    answers = read_answers(requests_path(folder, name)) if question.asked.requests else []
    rows, items = score_question(question, answers)
    unscorable = [{"task": item.task, "item": item.item, "reason": item.reason} for item in question.task.unscorable]
    for kind, found, schema in zip(
        _WORTH,
        ([{"is_end": is_end, **item} for item in items], unscorable, [{"is_end": is_end, **row} for row in rows]),
        (_ITEMS, _UNSCORABLE, _SCORES),
        strict=True,
    ):
        write_parquet(requests_path(folder / kind, name), pa.Table.from_pylist(found, schema), "")


def score_question(question: Question, answers: Sequence[Answer]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return what answers to a task are worth: rows of the view scores, the whole task's first, and of scored_items."""
    from flows.evaluation_model import score_answers

    task = question.task
    found: dict[str, Any] = {"results": {}, "samples": {}}
    if question.asked.requests:
        found = score_answers(task, question.asked, answers)
    items = [
        {
            "task": task.name,
            "subject": subject,
            "item": task.places[subject][sample["doc_id"]],
            "score": float(sample[task.metric]),
        }
        for subject, samples in found["samples"].items()
        for sample in samples
    ]
    return _rows(task, found["results"], items), items


def _rows(task: "EvaluationTask", results: dict[str, Any], items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for the task, the mean over its subjects, and, where it has several, one for each of these."""
    common = {"task": task.name, "metric": task.metric, "num_fewshot": task.num_fewshot}
    subjects: list[dict[str, Any]] = []
    for subject in task.subtasks:
        scores = [item["score"] for item in items if item["subject"] == subject]
        score = float(results[subject][f"{task.metric},none"])
        row = {"subject": subject, "score": score, "stderr": _standard_error(scores), "num_items": len(scores)}
        subjects.append({**common, **row})
    whole = {
        **common,
        # Of a task whose items are all too long, say, there is none.
        "score": sum(row["score"] for row in subjects) / len(subjects) if subjects else None,
        "stderr": _combine([(row["stderr"], row["num_items"]) for row in subjects]),
        "chance": task.chance,
        "num_items": len(items),
        "num_unscorable": len(task.unscorable),
        "num_shortened": task.num_shortened,
    }
    return [whole, *(subjects if len(subjects) > 1 else [])]


def _combine(subjects: list[tuple[float | None, int]]) -> float | None:
    """Return the standard error of the mean of subjects' scores, given each one's and its number of items.

    The item of a subject that has but one varies as those of the others do on average; None where all have but one.
    """
    variances = [error**2 * count for error, count in subjects if error is not None]
    if not variances:
        return None
    typical = sum(variances) / len(variances)
    squares = [typical if error is None else error**2 for error, _ in subjects]
    return float(sum(squares) ** 0.5 / len(subjects))


def _standard_error(scores: list[float]) -> float | None:
    """Return the standard error of the mean of `scores`; None where there is but one."""
    if len(scores) < 2:
        return None
    mean = sum(scores) / len(scores)
    variance = sum((score - mean) ** 2 for score in scores) / (len(scores) - 1)
    return float((variance / len(scores)) ** 0.5)
