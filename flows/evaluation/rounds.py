"""Evaluation of a run's models at the end of a round and in training: their answers and scores.

`evaluation/` of the run folder holds the requests to all models, one file per task. A round's
`evaluation/step-<number>/` holds the answers after that step, and their scores in scores/, items/ and unscorable/, one
file per task each, which the ledger's views of these names read. Its files.json lists the checksums of all of them.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_scoring.base.files import fingerprint, write_record
from data_scoring.base.progress import Progress
from data_scoring.config import EvalConfig
from data_scoring.ledger import refresh_ledger
from flows.evaluation.questions import Question, evaluation_folder, evaluation_of, read_questions, requests_folder
from flows.evaluation.scores import WORTH, write_scores
from flows.launch import launcher
from flows.launch.job_fields import final_checkpoint
from flows.launch.launcher import KeptRanks
from flows.run.folder import Run
from trainer.checkpoint_folder import read_checkpoint_record
from trainer.jobs import RepeatedEvaluation
from trainer.requests import has_answers, identify_answers, requests_path

_SECONDS_BETWEEN_LOOKS = 1.0
_RECORD = "files.json"


@dataclass(frozen=True)
class RoundEvaluation:
    """Evaluation of the models of a round; `trained` is the fingerprint of its training."""

    run: Run
    round_number: int
    trained: str

    @property
    def folder(self) -> Path:
        """Return the folder of the round's answers and scores."""
        return evaluation_folder(self.run, self.round_number)

    def ask(self, config: EvalConfig, progress: Progress, kept: KeptRanks | None = None) -> list[Question]:
        """Return the questions of the tasks of `config`, after the round's final model has answered them.

        Existing answers are reused. kept: see `flows.launch.launcher.launch`.
        """
        questions = read_questions(self.run, config.asked, config, progress)
        names = _asked(questions)
        if names:
            self._ask(names, progress, kept)
        return questions

    def score(self, questions: Sequence[Question], progress: Progress) -> None:
        """Score the answers of the round's final model.

        In-training answers are scored again as well, since labels may have been corrected.
        """
        folder = self._last_folder()
        self._forget(folder)
        for number, question in enumerate(questions):
            progress("scoring answers (tasks)", number, len(questions))
            write_scores(question, folder, is_end=True)
        self._record(folder)
        progress("scoring answers (tasks)", len(questions), len(questions))
        self.score_training(questions, anew=True)
        refresh_ledger(self.run.folder)

    def in_training(self, questions: Sequence[Question]) -> RepeatedEvaluation | None:
        """Return the in-training evaluation for the train job, or None if there is none."""
        every_steps = self.run.config.eval.every_steps
        names = _asked(questions)
        if every_steps is None or not names:
            return None
        evaluation = evaluation_of(self.run, names)
        return RepeatedEvaluation(**evaluation.model_dump(), answers=self.folder, every_steps=every_steps)

    def forget_others(self, questions: Sequence[Question]) -> None:
        """Delete answers and scores that this training would not give: with other inputs, or to other questions."""
        for folder in self.folder.glob("step-*"):
            known = {question.task.name for question in questions if self._has_answers(question, folder)}
            self._forget(folder)
            # Delete scores before their answers, so that an interruption leaves no scores without answers.
            for place in [*(folder / kind for kind in reversed(WORTH)), folder]:
                for path in place.glob("*.parquet"):
                    if path.stem not in known:
                        path.unlink()
            self._record(folder)

    def scoring_in_training(self, questions: Sequence[Question], progress: Progress) -> Progress:
        """Return a progress callback for the round's training, which also scores answers soon after they are given."""
        last_poll, known = 0.0, 0

        def note(what: str, done: int, total: int | None) -> None:
            nonlocal last_poll, known
            progress(what, done, total)
            if questions and time.monotonic() - last_poll > _SECONDS_BETWEEN_LOOKS:
                count, last_poll = len(list(self.folder.glob("step-*/*.parquet"))), time.monotonic()
                if count != known:
                    self.score_training(questions)
                    known = count

        return note

    def score_training(self, questions: Sequence[Question], anew: bool = False) -> None:
        """Score the in-training answers that have no scores yet; with `anew`, all of them."""
        is_any_scored = False
        for folder in sorted(self.folder.glob("step-*")):
            is_scored = False
            for question in questions:
                is_wanted = anew or not requests_path(folder / "scores", question.task.name).exists()
                if is_wanted and self._has_answers(question, folder):
                    self._forget(folder)
                    write_scores(question, folder, is_end=False)
                    is_scored = True
            if is_scored:
                self._record(folder)
            is_any_scored |= is_scored
        if is_any_scored:
            refresh_ledger(self.run.folder)

    def _forget(self, folder: Path) -> None:
        """Delete the record of the files in `folder`, which are about to change."""
        (folder / _RECORD).unlink(missing_ok=True)

    def _record(self, folder: Path) -> None:
        """Record the checksums of the answers and scores in `folder`."""
        places = (folder, *(folder / kind for kind in WORTH))
        files = sorted(path for place in places for path in place.glob("*.parquet"))
        write_record(folder / _RECORD, {"files": self.run.measured(files)})

    def _ask(self, names: tuple[str, ...], progress: Progress, kept: KeptRanks | None) -> None:
        """Answer the named tasks with the round's final model, unless the answers exist."""
        from flows.evaluation.harness_model import answer_job

        run, folder = self.run, self._last_folder()
        checkpoint = final_checkpoint(run, self.round_number)
        job = answer_job(run, self.round_number, checkpoint, evaluation_of(run, names), folder)
        requests = requests_folder(run)
        is_complete = all(
            has_answers(requests_path(folder, name), identify_answers(job.fingerprint, requests_path(requests, name)))
            for name in names
        )
        if not is_complete:
            self._forget(folder)
            launcher.launch(job, run.folder, f"evaluate-{self.round_number}", progress, run.config.launch, kept)

    def _last_folder(self) -> Path:
        """Return the folder of the answers of the round's final model."""
        step = read_checkpoint_record(final_checkpoint(self.run, self.round_number), "step")["step"]
        return self.folder / f"step-{step:08d}"

    def _has_answers(self, question: Question, folder: Path) -> bool:
        """Return whether `folder` has answers to exactly these requests, from this training at the folder's step."""
        requests, name = requests_folder(self.run), question.task.name
        if not question.asked.requests:
            return False
        model = fingerprint(self.trained, int(folder.name.removeprefix("step-")))
        return has_answers(requests_path(folder, name), identify_answers(model, requests_path(requests, name)))


def evaluation_records(run: Run, round_number: int) -> list[Path]:
    """Return the records of the files of a round's evaluations, one for each step."""
    return sorted(evaluation_folder(run, round_number).glob(f"step-*/{_RECORD}"))


def training_questions(run: Run, progress: Progress) -> list[Question]:
    """Return the questions of in-training evaluation; none without `eval.every_steps`."""
    config = run.config.eval
    if config.every_steps is None:
        return []
    return read_questions(run, config.training_tasks, config, progress)


def _asked(questions: Sequence[Question]) -> tuple[str, ...]:
    """Return the tasks that have requests: a task has none if no item fits into the model."""
    return tuple(question.task.name for question in questions if question.asked.requests)
