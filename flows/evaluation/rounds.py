"""Evaluation of a run's models: what tasks ask, what a model answers at a round's end and on the way, what it scores.

`evaluation/` of the run folder holds the requests, a file a task, which all of its models are asked. A round's
`evaluation/step-<number>/` holds the answers after that step and, below scores/, items/ and unscorable/, what they are
worth: a file a task each, which the ledger's views of these names read.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from data_scoring.base.files import fingerprint
from data_scoring.base.progress import Progress
from data_scoring.config import EvalConfig
from data_scoring.ledger import refresh_ledger
from flows.evaluation.questions import Question, evaluation_folder, evaluation_of, read_questions, requests_folder
from flows.evaluation.scores import WORTH, write_scores
from flows.launch import launcher
from flows.launch.job_fields import final_checkpoint
from flows.run.folder import Run
from trainer.checkpoint_folder import read_checkpoint_record
from trainer.jobs import RepeatedEvaluation
from trainer.requests import has_answers, identify_answers, requests_path

_SECONDS_BETWEEN_LOOKS = 1.0


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
        write_scores(question, folder, is_end=True)
    progress("scoring answers (tasks)", len(questions), len(questions))
    score_training(run, round_number, questions, anew=True)
    refresh_ledger(run.folder)


def _last_folder(run: Run, round_number: int) -> Path:
    """Return the folder of what the model that a round ended with answers."""
    step = int(read_checkpoint_record(final_checkpoint(run, round_number))["step"])
    return evaluation_folder(run, round_number) / f"step-{step:08d}"


def _ask(run: Run, checkpoint: Path, names: tuple[str, ...], folder: Path, progress: Progress) -> None:
    """Have a checkpoint's model give the answers to tasks that are missing in `folder`."""
    from flows.evaluation.harness_model import answer_job

    job = answer_job(run, checkpoint, evaluation_of(run, names), folder)
    requests = requests_folder(run)
    is_complete = all(
        has_answers(requests_path(folder, name), identify_answers(job.fingerprint, requests_path(requests, name)))
        for name in names
    )
    if not is_complete:
        launcher.launch(job, run.folder, f"evaluate-{checkpoint.parent.parent.name}", progress, run.config.launch)


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
        known = {
            question.task.name for question in questions if _is_asked_in_training(run, round_number, question, folder)
        }
        # What answers are worth goes before them, lest it stay without them.
        for place in [*(folder / kind for kind in reversed(WORTH)), folder]:
            for path in place.glob("*.parquet"):
                if path.stem not in known:
                    path.unlink()


def scoring_in_training(run: Run, round_number: int, questions: Sequence[Question], progress: Progress) -> Progress:
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
            if is_wanted and _is_asked_in_training(run, round_number, question, folder):
                write_scores(question, folder, is_end=False)
                scored += 1
    if scored:
        refresh_ledger(run.folder)


def _is_asked_in_training(run: Run, round_number: int, question: Question, folder: Path) -> bool:
    """Return whether `folder` has answers to these very requests that a round's training gave after its step."""
    requests, name = requests_folder(run), question.task.name
    if not question.asked.requests:
        return False
    model = fingerprint(run.fingerprint("train", round_number), int(folder.name.removeprefix("step-")))
    return has_answers(requests_path(folder, name), identify_answers(model, requests_path(requests, name)))
