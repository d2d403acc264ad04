"""Task scores, computed from the ranks' answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from data_scoring.base.parquet import write_parquet
from trainer.requests import Answer, read_answers, requests_path

if TYPE_CHECKING:
    from flows.evaluation.task_loading import EvaluationTask
from flows.evaluation.questions import Question

SCORES = pa.schema(
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
        ("higher_is_better", pa.bool_()),
        ("is_share", pa.bool_()),
    ]
)
ITEMS = pa.schema(
    [
        ("is_end", pa.bool_()),
        ("task", pa.string()),
        ("subject", pa.string()),
        ("item", pa.string()),
        ("score", pa.float64()),
    ]
)
# Every metric that lm-eval computes of a task, for tasks that are not in the table.
METRICS = pa.schema(
    [
        ("is_end", pa.bool_()),
        ("task", pa.string()),
        ("subject", pa.string()),
        ("metric", pa.string()),
        ("filter", pa.string()),
        ("score", pa.float64()),
        ("stderr", pa.float64()),
        ("higher_is_better", pa.bool_()),
    ]
)
# Folders next to the answers, with one file per task each; "metrics" has files of tasks that are not in the table only.
WORTH = ("items", "unscorable", "metrics", "scores")
UNSCORABLE = pa.schema([("task", pa.string()), ("item", pa.string()), ("reason", pa.string())])


def write_scores(question: Question, folder: Path, is_end: bool) -> None:
    """Write the scores of the answers to a task in `folder`; always again, since labels may have been corrected."""
    name = question.task.name
    answers = read_answers(requests_path(folder, name)) if question.asked.requests else []
    if question.task.entry:
        from flows.evaluation.open_scores import score_open_question

        rows, items, metrics = score_open_question(question, answers)
    else:
        (rows, items), metrics = score_question(question, answers), None
    unscorable = [{"task": item.task, "item": item.item, "reason": item.reason} for item in question.task.unscorable]
    written = [("items", [{"is_end": is_end, **item} for item in items], ITEMS), ("unscorable", unscorable, UNSCORABLE)]
    if metrics is not None:
        written.append(("metrics", [{"is_end": is_end, **row} for row in metrics], METRICS))
    written.append(("scores", [{"is_end": is_end, **row} for row in rows], SCORES))
    for kind, found, schema in written:
        write_parquet(requests_path(folder / kind, name), pa.Table.from_pylist(found, schema), "")


def score_question(question: Question, answers: Sequence[Answer]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the scores of answers to a task of the table.

    Rows of the view scores, the whole task first, and of scored_items.
    """
    from flows.evaluation.harness_model import score_answers

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
    """Return a row for the task (the mean over its subjects) and, if it has several subjects, one for each."""
    common = {"task": task.name, "metric": task.metric, "num_fewshot": task.num_fewshot}
    common |= {"higher_is_better": True, "is_share": True}
    subjects: list[dict[str, Any]] = []
    for subject in task.subtasks:
        scores = [item["score"] for item in items if item["subject"] == subject]
        score = float(results[subject][f"{task.metric},none"])
        row = {"subject": subject, "score": score, "stderr": _standard_error(scores), "num_items": len(scores)}
        subjects.append({**common, **row})
    whole = {
        **common,
        # None if no item can be scored, for example if all items are too long.
        "score": sum(row["score"] for row in subjects) / len(subjects) if subjects else None,
        "stderr": _combine([(row["stderr"], row["num_items"]) for row in subjects]),
        "chance": task.chance,
        "num_items": len(items),
        "num_unscorable": len(task.unscorable),
        "num_shortened": task.num_shortened,
    }
    return [whole, *(subjects if len(subjects) > 1 else [])]


def _combine(subjects: list[tuple[float | None, int]]) -> float | None:
    """Return the standard error of the mean of subjects' scores, given each standard error and number of items.

    Subjects with a single item are assumed to have the others' average variance; None if all have a single item.
    """
    variances = [error**2 * count for error, count in subjects if error is not None]
    if not variances:
        return None
    typical = sum(variances) / len(variances)
    squares = [typical if error is None else error**2 for error, _ in subjects]
    return float(sum(squares) ** 0.5 / len(subjects))


def _standard_error(scores: list[float]) -> float | None:
    """Return the standard error of the mean of `scores`; None for fewer than two."""
    if len(scores) < 2:
        return None
    mean = sum(scores) / len(scores)
    variance = sum((score - mean) ** 2 for score in scores) / (len(scores) - 1)
    return float((variance / len(scores)) ** 0.5)
