"""Layer ablation measured by evaluation: a model's scores in tasks without each block of layers."""

from pathlib import Path

import pyarrow as pa

from data_scoring.base.files import fingerprint
from data_scoring.base.parquet import write_parquet
from data_scoring.base.progress import Progress
from data_scoring.config import EvalConfig
from data_scoring.evaluation.tasks import other_tasks, task_names
from flows.evaluation.questions import evaluation_of, read_questions
from flows.evaluation.results import SCORE
from flows.evaluation.scores import score_question
from flows.launch import launcher
from flows.launch.job_fields import device_kind, job_fields
from flows.run.folder import Run
from flows.run.stored_model import StoredModel
from trainer.devices import resolve_precision
from trainer.jobs import EvaluateJob
from trainer.requests import has_answers, identify_answers, read_answers, requests_path

_LONGEST = 3
# One row per block and task; the block of length 0 is the whole model.
_SCORES = pa.schema([("start", pa.int32()), ("length", pa.int32()), *SCORE])


def measure_scores(run: Run, teacher: StoredModel, folder: Path, config: EvalConfig, progress: Progress) -> Path:
    """Return scores.parquet in `folder`: the teacher's scores in the tasks of `config` without each block of layers.

    Blocks have zero to three layers. One launch evaluates them one after the other, in the layout of `run`. Existing
    answers are used again. Raises ValueError if a task cannot be read.
    """
    if others := other_tasks(config.tasks):
        raise ValueError(
            f"--tasks: {others[0]} is none of {', '.join(task_names())}, whose scores are averaged; omit it"
        )
    read = read_questions(run, config.tasks, config, progress)
    questions = [question for question in read if question.asked.requests]
    names = tuple(question.task.name for question in questions)
    if not names:
        [first, *_] = read[0].task.unscorable
        tasks = ", ".join(config.tasks)
        raise ValueError(f"--tasks: no item of {tasks} can be scored ({first.item}: {first.reason}); name others")
    precision = resolve_precision(run.config.train.precision, device_kind(run.config))
    fields = job_fields(run, 1, fingerprint("layer scores", teacher.identity, precision))
    job = EvaluateJob(
        **fields | {"model": teacher.config, "round_folder": folder.absolute()},
        weights=teacher.checkpoint.absolute(),
        evaluation=evaluation_of(run, names),
        answers=folder.absolute() / "answers",
        loss_kernel=run.config.score.loss_kernel,
        longest_block=_LONGEST,
    )
    blocks = job.blocks
    if not all(_is_answered(job, block, name) for block in blocks for name in names):
        launcher.launch(job, run.folder, "layer-scores", progress, run.config.launch)
    rows = []
    for number, block in enumerate(blocks):
        progress("scoring answers (blocks of layers)", number, len(blocks))
        for question in questions:
            answers = read_answers(requests_path(job.part(*block)[0], question.task.name))
            [row, *_], _ = score_question(question, answers)
            rows.append({"start": block[0], "length": block[1], **{name: row[name] for name in _SCORES.names[2:]}})
    progress("scoring answers (blocks of layers)", len(blocks), len(blocks))
    path = folder / "scores.parquet"
    write_parquet(path, pa.Table.from_pylist(rows, _SCORES), job.fingerprint)
    return path


def _is_answered(job: EvaluateJob, block: tuple[int, int], name: str) -> bool:
    folder, model = job.part(*block)
    identity = identify_answers(model, requests_path(job.evaluation.requests, name))
    return has_answers(requests_path(folder, name), identity)
