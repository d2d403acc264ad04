"""Scores of tasks that are not in Reprise's table: lm-eval's own metrics, of which tables show the first."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from flows.evaluation.harness_model import score_answers
from flows.evaluation.questions import Question
from flows.evaluation.task_index import explaining
from trainer.requests import Answer

# Metrics whose scores are shares, 0 to 1. Others, of another scale or of a user's own making, are shown as they are.
_SHARES = frozenset(
    ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "acc_all", "exact_match", "em", "f1", "likelihood")
)
Rows = list[dict[str, Any]]


def score_open_question(question: Question, answers: Sequence[Answer]) -> tuple[Rows, Rows, Rows]:
    """Return rows of the views scores, the whole task first, scored_items, and metrics."""
    task = question.task
    common = {"task": task.name, "num_fewshot": task.num_fewshot}
    whole = {
        **common,
        "metric": task.metric,
        "chance": task.chance,
        "num_unscorable": len(task.unscorable),
        "num_shortened": task.num_shortened,
        "higher_is_better": True,
        "is_share": task.metric in _SHARES,
    }
    if not question.asked.requests:
        return [{**whole, "num_items": 0}], [], []
    with explaining(task.name, "scored"):
        found = score_answers(task, question.asked, answers)
    names = [task.name, *(name for name in task.subtasks if name != task.name)]
    rows, items, metrics = [], [], []
    for name in names:
        subject = None if name == task.name else name
        measured = _metrics(found["results"][name], found["higher_is_better"].get(name, {}))
        metrics += [{"task": task.name, "subject": subject, **row} for row in measured]
        first = next((row for row in measured if row["metric"] == task.metric), measured[0] if measured else None)
        given = {} if first is None else {key: value for key, value in first.items() if key != "filter"}
        given["is_share"] = given.get("metric") in _SHARES
        samples = [
            sample
            for sample in found["samples"].get(name, [])
            if first is not None and sample["filter"] == first["filter"]
        ]
        count = len(samples) if name in task.subtasks else sum(map(len, task.samples.values()))
        rows.append({**(common if subject else whole), **given, "subject": subject, "num_items": count})
        aggregate = task.subtasks[name].aggregation().get(given.get("metric")) if name in task.subtasks else None
        items += [
            {
                "task": task.name,
                "subject": name,
                "item": task.places[name][sample["doc_id"]],
                "score": _score(sample.get(given["metric"]), aggregate),
            }
            for sample in samples
        ]
    return rows, items, metrics


def _metrics(results: Mapping[str, Any], higher_is_better: Mapping[str, bool]) -> Rows:
    """Return a row for each metric and filter in lm-eval's results of a task or a group, "acc,none" and so on."""
    rows = []
    for key, value in results.items():
        metric, is_metric, chosen = key.partition(",")
        if is_metric and not metric.endswith("_stderr"):
            rows.append(
                {
                    "metric": metric,
                    "filter": chosen,
                    "score": _number(value),
                    "stderr": _number(results.get(f"{metric}_stderr,{chosen}")),
                    "higher_is_better": higher_is_better.get(metric) is not False,
                }
            )
    return rows


def _number(value: Any) -> float | None:
    """Return a finite number, or None: lm-eval writes "N/A" for what it cannot compute."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _score(value: Any, aggregate: Any) -> float | None:
    """Return an item's score: its value, or, of a likelihood and a number of words or bytes, the metric over it."""
    if isinstance(value, tuple) and len(value) == 2 and aggregate is not None:
        try:
            return _number(aggregate([value]))
        except (ArithmeticError, TypeError, ValueError):
            return None
    return _number(value)
