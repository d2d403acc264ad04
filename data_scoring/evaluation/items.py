"""Evaluation items, read from local files in the data sets' original schemas.

A folder has one file per task (docs/evaluation.md lists them); C-Eval, CMMLU, MMLU and AGIEval may also be in their
released form, one file per subject. A broken item is an error that names file and line; an item that lacks an answer or
an option is kept with the reason, and counted as unscorable.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_scoring.evaluation.rows import Row, defect, item_text
from data_scoring.evaluation.tasks import TASKS, Files


@dataclass(frozen=True)
class ItemText:
    """The text of an evaluation item, with its task and its identifier within the task."""

    task: str
    item: str
    text: str


@dataclass(frozen=True)
class Item:
    """One item of a task: its origin (`file:line`), subject and row, and why it cannot be scored, or None."""

    place: str
    subject: str
    row: Row
    defect: str | None


@dataclass(frozen=True)
class Unscorable:
    """An item that cannot be scored: its origin (`file:line`, or the hub's split and index), and the reason."""

    task: str
    item: str
    reason: str


# Why an item that the model cannot read cannot be scored.
TOO_LONG = "longer than the model's length, even without examples"

# Errors that conversion raises for a record that is not an item of its task.
_BROKEN = (ValueError, KeyError, TypeError, AttributeError)


def read_items(task: str, data: Path) -> list[Item]:
    """Return a task's items in the folder `data`, in the files' order.

    Raises ValueError, in one line that names file and line, if a file is missing or is not JSON or CSV, if a field is
    missing, or if an answer is not one of the options.
    """
    return _read(task, data, TASKS[task].files)


def read_examples(task: str, data: Path) -> list[Item]:
    """Return the few-shot examples of a task, of all subjects, in the files' order.

    Raises ValueError as `read_items` does, and if the task has no file of examples.
    """
    examples = TASKS[task].examples
    if examples is None:
        raise ValueError(f"{task}: has no file of solved examples; name one in its row, or set its num_fewshot to 0")
    return _read(task, data, examples)


def make_item(task: str, place: str, subject: str, row: Row) -> Item:
    """Return the item of a row in the hub's schema. Raises ValueError, with its origin, if it is broken."""
    try:
        return Item(place, subject, row, defect(TASKS[task].schema, row))
    except _BROKEN as error:
        raise ValueError(f"{place}: {_said(error)}") from None


def item_files(names: Sequence[str], data: Path) -> list[Path]:
    """Return the existing files in the folder `data` that the tasks' items and examples are read from."""
    tasks = [TASKS[name] for name in names]
    labels = [task.files.labels for task in tasks if task.files.labels]
    listed = [name for task in tasks for files in (task.files, task.examples) if files for name in files.names]
    found = [data / name for name in [*labels, *listed] if (data / name).is_file()]
    for name in names:
        found += [path for path in sorted((data / name).rglob("*")) if path.is_file()]
    return found


def evaluation_texts(names: Sequence[str], data: Path) -> Iterator[ItemText]:
    """Yield the text of every item of those tasks in the folder `data`, whether it can be scored or not."""
    for task in names:
        for item in read_items(task, data):
            yield ItemText(task, item.place, item_text(TASKS[task].schema, item.row))


def _read(task: str, data: Path, files: Files) -> list[Item]:
    schema, items = TASKS[task].schema, []
    for path, subject in _find(task, data, files):
        for line, record in _records(path, files):
            place = line
            try:
                named = {schema.subject: subject, **record} if schema.subject and subject else record
                name = str(named[schema.subject]) if schema.subject else ""
                parts = schema.split(named)
                for number, part in enumerate(parts, start=1):
                    place = line if len(parts) == 1 else f"{line} question {number}"
                    row = schema.convert(part)
                    items.append(Item(place, name, row, defect(schema, row)))
            except _BROKEN as error:
                raise ValueError(f"{path.parent / place}: {_said(error)}") from None
    if not items:
        raise ValueError(f"eval.data: {data} holds no item of {task}; put the data set's items there")
    return items


def _said(error: Exception) -> str:
    # A KeyError's text is the field alone.
    if isinstance(error, KeyError):
        return f"no field {error}; write it, or leave the item out"
    if isinstance(error, ValueError):
        return str(error)
    return f"not an item as the data set has them ({error}); repair the line"


def _find(task: str, data: Path, files: Files) -> list[tuple[Path, str]]:
    """Return the files of a task, each with its subject, or "" if its records name the subject."""
    for name in files.names:
        if (data / name).is_file():
            return [(data / name, "")]
    folder = data / task
    if files.release and folder.is_dir():
        found = sorted(folder.glob(files.release))
        before, _, after = Path(files.release).name.partition("*")
        if found:
            return [(path, path.name.removeprefix(before).removesuffix(after)) for path in found]
    places = [str(data / name) for name in files.names] + ([str(folder / files.release)] if files.release else [])
    missing = " or ".join(places)
    raise ValueError(
        f"eval.data: no file {missing}, which {task} needs; put it there, or leave {task} out of eval.tasks"
    )


def _records(path: Path, files: Files) -> Iterator[tuple[str, Any]]:
    """Yield (`file:line`, record) of a JSON lines or CSV file. Raises ValueError if its content is invalid."""
    if path.suffix == ".csv":
        yield from _csv_records(path, files.header)
        return
    records = list(_json_records(path))
    if files.labels:
        labels = _read_labels(path.with_name(files.labels), path, len(records))
        records = [(place, {**record, "label": label}) for (place, record), label in zip(records, labels, strict=True)]
    yield from records


def _json_records(path: Path) -> Iterator[tuple[str, Any]]:
    # Split bytes, not text: str.splitlines would also split at characters such as U+2028.
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        place = f"{path.name}:{number}"
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path.parent / place}: not valid JSON ({error.msg} at column {error.colno}); repair the line"
            ) from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path.parent / place}: not UTF-8 ({error.reason}); write the file in UTF-8") from None
        if not isinstance(record, dict | list):
            raise ValueError(f"{path.parent / place}: {record!r:.40} is no item; repair the line")
        if b"\\ud" in line.lower() and not _is_unicode(record):
            raise ValueError(f"{path.parent / place}: holds half of a surrogate pair (\\ud…); repair the line")
        yield place, record


def _is_unicode(record: Any) -> bool:
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _csv_records(path: Path, header: Sequence[str]) -> Iterator[tuple[str, Row]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, fieldnames=header or None, strict=True)
            for row in rows:
                if None in row or None in row.values():
                    raise ValueError(
                        f"{path}:{rows.line_num}: not {len(rows.fieldnames or ())} fields; repair the line"
                    )
                yield f"{path.name}:{rows.line_num}", dict(row)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason}); write the file in UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{path}:{rows.line_num}: not valid CSV ({error}); repair the line") from None


def _read_labels(path: Path, items: Path, count: int) -> list[str]:
    if not path.is_file():
        raise ValueError(f"eval.data: no file {path}, which has the answers to {items.name}; put it there")
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    labels = [line.strip() for line in (lines[:-1] if lines[-1] == "" else lines)]
    if len(labels) != count:
        raise ValueError(f"{path}: {len(labels)} labels for the {count} items of {items.name}; they go line by line")
    return labels
