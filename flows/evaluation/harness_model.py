"""A model as lm-eval sees it, and what a task scores by answers that the model has given.

Two ways lead there. A task's requests are collected by `flows.evaluation.harness_requests.ask`, written with
`trainer.requests.write_requests`, answered by an `EvaluateJob` or in the middle of training, read with
`read_answers`, and scored by `score_answers`. Or lm-eval itself drives a `HarnessModel` that `open_model` returns,
which launches ranks for what it is asked.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate

from data_scoring.base.files import checksum, fingerprint
from data_scoring.base.progress import Progress
from data_scoring.tokenizer.tokenizer import open_tokenizer
from flows.evaluation.harness_requests import Asked, HarnessTasks, Reader, Response
from flows.evaluation.harness_task import patched_harness
from flows.launch import launcher
from flows.launch.job_fields import device_kind, job_fields
from flows.run.folder import Run, read_run
from flows.run.stored_model import find_model
from trainer.checkpoint_folder import RECORD
from trainer.devices import resolve_precision
from trainer.jobs import EvaluateJob, Evaluation
from trainer.requests import Answer, read_answers, requests_path, write_requests

# Of items, for the standard error of metrics that have no closed form of it; with none, lm-eval gives no errors at all.
_RESAMPLINGS = 1000


class HarnessModel(LM):
    """A model for lm-eval: `respond` returns what lm-eval expects for each of the instances that it is given."""

    def __init__(self, respond: Callable[[list[Instance]], list[Response]]) -> None:
        super().__init__()
        self._respond = respond

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        """Return log-likelihoods, nats, and whether each continuation is what would be generated."""
        return self._respond(requests)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        """Return the log-likelihoods of whole texts, nats."""
        return self._respond(requests)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        """Return greedy continuations, text."""
        return self._respond(requests)


def open_reader(run: Run) -> Reader:
    """Return what reads text as the models of a run do."""
    corpus = run.corpus()
    return Reader(open_tokenizer(corpus.tokenizer_path, run.config.tokenizer.end_of_document), corpus.seq_length)


def score_answers(task: HarnessTasks, asked: Asked, answers: Sequence[Answer]) -> dict[str, Any]:
    """Return lm-eval's results for a task whose requests, `asked`, have these answers, in their order.

    results: by subtask, its metrics ("acc,none") with standard errors ("acc_stderr,none"); samples: by subtask, its
    items with what each scored.
    """
    model = HarnessModel(lambda instances: asked.respond(instances, answers))
    with patched_harness():
        found: Any = evaluate(
            model,
            {"tasks": dict(task.subtasks)},
            samples=dict(task.samples),
            bootstrap_iters=_RESAMPLINGS,
            log_samples=True,
        )
    return dict(found)


def answer_job(run: Run, round_number: int, checkpoint: Path, evaluation: Evaluation, answers: Path) -> EvaluateJob:
    """Return the job that has the model of a round's `checkpoint` answer, in the run's layout, into folder `answers`.

    Its fingerprint, by which the answers are known, stands for the weights and the precision.
    """
    precision = resolve_precision(run.config.train.precision, device_kind(run.config))
    identity = fingerprint("evaluate", checksum(checkpoint / RECORD), precision)
    return EvaluateJob(
        **job_fields(run, round_number, identity),
        weights=checkpoint,
        evaluation=evaluation,
        answers=answers,
        loss_kernel=run.config.score.loss_kernel,
    )


def open_model(place: Path, round_number: int | None, progress: Progress) -> HarnessModel:
    """Return, for lm-eval, the model that a round of the run in `place` ended with, by default the last.

    Ranks are launched, in the run's layout, each time that it is asked anything. Raises ValueError where there is no
    such round.
    """
    stored = find_model(place, round_number)
    number = stored.round_number
    if number is None:
        raise ValueError(f"{place}: is an imported model; give a run's folder, of which the ranks' layout is known")
    run = read_run(stored.place)
    reader = open_reader(run)

    def respond(instances: list[Instance]) -> list[Response]:
        asked = reader.read(instances)
        with tempfile.TemporaryDirectory(dir=run.folder, prefix=".evaluation-") as folder:
            evaluation = Evaluation(
                requests=Path(folder), tasks=("asked",), end_of_document=run.config.tokenizer.end_of_document
            )
            write_requests(requests_path(evaluation.requests, "asked"), asked.requests)
            job = answer_job(run, number, stored.checkpoint, evaluation, Path(folder) / "answers")
            launcher.launch(job, run.folder, "evaluate", progress, run.config.launch)
            return asked.respond(instances, read_answers(requests_path(job.answers, "asked")))

    return HarnessModel(respond)
