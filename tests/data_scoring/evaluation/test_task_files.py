import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_scoring.evaluation.task_files import files_of_task
from flows.evaluation.open_task_loading import load_open_tasks

_TASK: dict[str, Any] = {
    "task": "mine", "dataset_path": "json", "test_split": "test", "output_type": "loglikelihood",
    "doc_to_text": "{{question}}", "doc_to_target": "{{word}}", "metric_list": [{"metric": "acc"}],
}  # fmt: skip


def _write(path: Path, **fields: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(fields))
    return path


def _task(folder: Path, **arguments: Any) -> Path:
    return _write(folder / "mine.yaml", **{**_TASK, "dataset_kwargs": arguments})


def _included(folder: Path) -> Path:
    base = {**_TASK, "dataset_kwargs": {"data_files": {"test": "items.jsonl"}}}
    del base["task"]
    _write(folder / "common" / "base.yaml", **base)
    return _write(folder / "mine.yaml", task="mine", include="common/base.yaml")


def _group(folder: Path) -> Path:
    task = {**_TASK, "dataset_kwargs": {"data_files": {"test": "items.jsonl"}}}
    return _write(folder / "group.yaml", group="all", task=[task])


# How a task names its data: each writes the task and returns its file.
_NAMED: dict[str, Callable[[Path], Path]] = {
    "data_files, by split": lambda folder: _task(folder, data_files={"test": "items.jsonl"}),
    "data_files, a list": lambda folder: _task(folder, data_files={"test": ["items.jsonl"]}),
    "data_files, a pattern": lambda folder: _task(folder, data_files={"test": "item*.jsonl"}),
    "data_dir": lambda folder: _task(folder, data_dir="sets"),
    "a folder as dataset_path": lambda folder: _write(folder / "mine.yaml", **{**_TASK, "dataset_path": "sets"}),
    "data_files, a URL": lambda folder: _task(folder, data_files={"test": (folder / "items.jsonl").as_uri()}),
    "an included file in another folder": _included,
    "a task in its group's file": _group,
}


@pytest.mark.parametrize("kind", _NAMED)
def test_the_data_that_a_task_reads_are_among_its_files(kind: str, tmp_path: Path) -> None:
    row = f"{json.dumps({'question': 'the', 'word': 'cat'})}\n"
    places = [tmp_path / "items.jsonl", tmp_path / "sets" / "test.jsonl"]
    for place in places:
        place.parent.mkdir(exist_ok=True)
        place.write_text(row)
    path = _NAMED[kind](tmp_path)
    [task] = load_open_tasks(str(path), None, None, lambda context, continuations: True)
    [subtask] = task.subtasks.values()
    assert [doc["word"] for doc in subtask.eval_docs] == ["cat"]
    assert len(set(places) & set(files_of_task(path))) == 1
