"""A model for lm-eval, and the scoring of a task from the model's answers.

There are two ways to evaluate a model. Either `flows.evaluation.harness_requests.ask` collects a task's requests,
`trainer.requests.write_requests` writes them, an `EvaluateJob` or an in-training evaluation answers them,
`read_answers` reads the answers, and `score_answers` scores them. Or lm-eval itself calls a `HarnessModel` that
`open_model` returns, which launches ranks for each call.
"""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate

from data_scoring.base.files import checksum, fingerprint
from data_scoring.base.progress import Progress
from data_scoring.tokenizer.tokenizer import open_tokenizer
from flows.evaluation.harness_requests import Asked, HarnessTasks, Reader, Response, seed_examples
from flows.evaluation.harness_task import patched_harness
from flows.launch import launcher
from flows.launch.job_fields import device_kind, job_fields
from flows.run.folder import Run, read_run
from flows.run.stored_model import find_model
from trainer.checkpoint_folder import RECORD
from trainer.devices import resolve_precision
from trainer.jobs import EvaluateJob, Evaluation
from trainer.requests import Answer, read_answers, requests_path, write_requests

# Bootstrap resamplings, for standard errors without a closed form; with 0, lm-eval computes no standard errors at all.
_RESAMPLINGS = 1000


class HarnessModel(LM):
    """A model for lm-eval: `respond` returns, for each instance, the response that lm-eval expects."""

    def __init__(self, respond: Callable[[list[Instance]], list[Response]]) -> None:
        super().__init__()
        self._respond = respond

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        """Return log-likelihoods, nats, and whether each continuation is the greedy one."""
        return self._respond(requests)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        """Return the log-likelihoods of whole texts, nats."""
        return self._respond(requests)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        """Return greedy continuations, text."""
        return self._respond(requests)


def open_reader(run: Run) -> Reader:
    """Return a reader with the tokenizer and the sequence length of a run's models."""
    corpus = run.corpus()
    return Reader(open_tokenizer(corpus.tokenizer_path, run.config.tokenizer.end_of_document), corpus.seq_length)


def score_answers(task: HarnessTasks, asked: Asked, answers: Sequence[Answer]) -> dict[str, Any]:
    """Return lm-eval's results for a task, given the answers to its requests `asked`, in their order.

    results: by subtask, its metrics ("acc,none") with standard errors ("acc_stderr,none"); samples: by subtask, its
    items with their scores. `task.groups` are in results, too.
    """
    model = HarnessModel(lambda instances: asked.respond(instances, answers))
    seed_examples(task)
    # What lm-eval and functions of task files print is no output of ours.
    with patched_harness(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        found: Any = evaluate(
            model,
            {"tasks": dict(task.subtasks), "groups": dict(task.groups)},
            samples=dict(task.samples),
            bootstrap_iters=_RESAMPLINGS,
            log_samples=True,
        )
    return dict(found)


def answer_job(run: Run, round_number: int, checkpoint: Path, evaluation: Evaluation, answers: Path) -> EvaluateJob:
    """Return the job that answers `evaluation` with a round's `checkpoint`, in the run's layout; writes to `answers`.

    Its fingerprint, which the answers carry, represents the weights and the precision.
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
    """Return, for lm-eval, the final model of a round (default: the last) of the run in `place`.

    Each call launches ranks, in the run's layout. Raises ValueError if there is no such round.
    """
    stored = find_model(place, round_number)
    number = stored.round_number
    if number is None:
        raise ValueError(f"{place}: is an imported model, without a layout for ranks; give a run folder")
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
