"""An evaluation task from outside the package: what the weather is like, of two options."""

from typing import Any

from data_scoring.evaluation.rows import Row, Schema
from data_scoring.evaluation.tasks import Files, Task


def convert(record: Row) -> Row:
    """Return the record with its answer, a or b, as the index of the option, or None where it has none."""
    answer = record.get("answer")
    if answer not in ("a", "b", None):
        raise ValueError(f"answer {answer!r} is neither a nor b; repair the answer")
    label = None if answer is None else "ab".index(answer)
    return {"question": record["question"], "options": [record["a"], record["b"]], "label": label}


DEFINITION: dict[str, Any] = {
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}} It is",
    "doc_to_choice": "options",
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}

WEATHER = Task(
    name="weather",
    title="Weather",
    group="Outside",
    schema=Schema(
        convert,
        question=lambda row: row["question"],
        options=lambda row: row["options"],
        answer=lambda row: row["label"],
        gold=lambda row: [row["label"]],
        num_options=2,
    ),
    files=Files(("weather.jsonl",)),
    definition=DEFINITION,
)
