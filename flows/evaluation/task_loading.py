"""Loading of the table's tasks: lm-eval's definitions or the table's own, over local files or the hub's data sets.

docs/evaluation.md lists their prompts, shots and metrics, with sources.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from datasets.exceptions import DatasetsError

from data_scoring.evaluation.items import (
    TOO_LONG,
    Item,
    ItemText,
    Unscorable,
    make_item,
    read_examples,
    read_items,
)
from data_scoring.evaluation.rows import item_text
from data_scoring.evaluation.tasks import TASKS, Task, other_tasks, resolve_names, task_names

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager


@dataclass(frozen=True)
class EvaluationTask:
    """A task, of the benchmark table or another one: lm-eval's tasks, one per subject, and the items that they score.

    The score of a task of the table is the unweighted mean of its subtasks' scores (OpenCompass' naive average);
    another one's is lm-eval's own.
    """

    name: str
    metric: str  # lm-eval's name of the metric that the table shows
    num_fewshot: int
    subtasks: dict[str, ConfigurableTask]  # by lm-eval's name; without those that have no scorable item
    samples: dict[str, list[int]]  # by subtask: indices of the scored items in its `eval_docs`, ascending
    places: dict[str, list[str]]  # by subtask: origin (`file:line`) of each of its `eval_docs`
    chances: dict[str, list[float]]  # by subtask: right options / options of each of its `eval_docs`; 0 for generation
    num_examples: dict[str, list[int]]  # by subtask: examples in the prompt of each of its `samples`
    unscorable: list[Unscorable]
    # Of a task that is not in the table: the entry of `eval.tasks` that stands for it, and lm-eval's group, by name.
    entry: str = ""
    groups: dict[str, Any] = field(default_factory=dict)

    @property
    def chance(self) -> float | None:
        """Return the expected score of guessing, 0 to 1: the mean over items of right options / options.

        None if it is unknown.
        """
        if self.entry and not all(self.chances[subtask] for subtask in self.samples):
            return None
        means = [
            sum(self.chances[subtask][index] for index in indices) / len(indices)
            for subtask, indices in self.samples.items()
        ]
        return sum(means) / len(means) if means else 0.0

    @property
    def num_shortened(self) -> int:
        """Return how many items have fewer examples than `num_fewshot`, because their prompt was too long."""
        if self.entry:
            # Known once the requests are made.
            return sum(
                count < (task.config.num_fewshot or 0)
                for task in self.subtasks.values()
                for count in getattr(task, "num_examples", ())
            )
        return sum(count < self.num_fewshot for counts in self.num_examples.values() for count in counts)

    def without(self, reasons: Mapping[tuple[str, int], str]) -> EvaluationTask:
        """Return the task with items, by subtask and index in its `eval_docs`, listed as unscorable."""
        kept = {
            subtask: [number for number, index in enumerate(indices) if (subtask, index) not in reasons]
            for subtask, indices in self.samples.items()
        }
        kept = {subtask: numbers for subtask, numbers in kept.items() if numbers}
        listed = [
            Unscorable(self.name, self.places[subtask][index], reason)
            for (subtask, index), reason in sorted(reasons.items())
        ]
        return replace(
            self,
            subtasks={subtask: self.subtasks[subtask] for subtask in kept},
            samples={subtask: [self.samples[subtask][number] for number in kept[subtask]] for subtask in kept},
            num_examples={
                subtask: [self.num_examples[subtask][number] for number in kept[subtask]]
                for subtask in kept
                if subtask in self.num_examples
            },
            unscorable=[*self.unscorable, *listed],
        )


def load_tasks(
    names: Sequence[str],
    data: Path | None,
    limit: int | None,
    fits: Callable[[str, Sequence[str]], bool],
    num_tokens: Callable[[Sequence[str]], Sequence[int]],
) -> list[EvaluationTask]:
    """Return the named tasks of the table (`paper` and `ablation` expand to several), ready for evaluation.

    data: the folder of the items' files (data_scoring.evaluation.items); None reads them from the hub.
    limit: use only the first `limit` items of each subject.
    fits: `fits(context, continuations)` returns whether a prompt with the longest of its continuations fits into the
        model; items that do not fit are listed as unscorable. For generation, the continuation has as many words as
        the largest number of new tokens.
    num_tokens: `num_tokens(texts)` returns each text's number of tokens, by which OpenCompass divides losses.

    Raises ValueError, in one line, for a task that is not in the table, and for files that are missing or broken.
    """
    if data is not None and not data.is_dir():
        raise ValueError(f"eval.data: no folder {data}; give the folder of the tasks' files, or remove it")
    if unknown := other_tasks(names):
        raise ValueError(f"eval.tasks: unknown task {unknown[0]!r}; choose from {', '.join(task_names())}")
    resolved, ours = resolve_names(names), {"fits": fits, "num_tokens": num_tokens}
    # Importing lm-eval takes a second.
    from flows.evaluation.harness_task import patched_harness

    with patched_harness():
        return [_load(_Rows(TASKS[name], data, limit), ours) for name in resolved]


def task_texts(tasks: Sequence[EvaluationTask]) -> Iterator[ItemText]:
    """Yield the text of every item of loaded tasks, for data sets that are not local files."""
    for task in tasks:
        for subtask, harness_task in task.subtasks.items():
            for place, doc in zip(task.places[subtask], harness_task.eval_docs, strict=True):
                yield ItemText(task.name, place, item_text(TASKS[task.name].schema, doc))


@dataclass
class _Rows:
    """The rows of one task for lm-eval; items that cannot be scored are listed instead."""

    task: Task
    data: Path | None
    limit: int | None
    places: dict[str, list[str]] = field(default_factory=dict)  # by subtask: the items' origins
    chances: dict[str, list[float]] = field(default_factory=dict)
    unscorable: list[Unscorable] = field(default_factory=list)
    _by_subject: dict[str, list[Item]] = field(default_factory=dict)
    _examples: dict[str, list[Item]] = field(default_factory=dict)

    def read_subjects(self) -> list[str]:
        """Return the subjects in the local files, in file order ([""] for a task without subjects)."""
        assert self.data is not None
        for item in read_items(self.task.name, self.data):
            self._by_subject.setdefault(item.subject, []).append(item)
        if self.task.num_fewshot:
            for item in read_examples(self.task.name, self.data):
                self._examples.setdefault(item.subject, []).append(item)
        return list(self._by_subject)

    def datasets_of(self, subject: str) -> Callable[[Any], datasets.DatasetDict]:
        """Return the function of lm-eval's task configuration that returns a subject's splits."""

        def make(config: Any) -> datasets.DatasetDict:
            split = config.test_split or config.validation_split
            if self.data is not None:
                items, examples = self._by_subject[subject], self._examples.get(subject, [])
            else:
                items, examples = _read_hub(self.task, config, split)
            rows = {split: self._keep(config.task, items[: self.limit])}
            if config.num_fewshot:
                rows[config.fewshot_split] = self._solved(config, subject, examples)
            # Only include splits with rows: features are inferred from rows, and lm-eval reads the first row.
            return datasets.DatasetDict({name: datasets.Dataset.from_list(part) for name, part in rows.items()})

        return make

    def _keep(self, subtask: str, items: list[Item]) -> list[dict[str, Any]]:
        bad = [Unscorable(self.task.name, item.place, item.defect) for item in items if item.defect]
        self.unscorable += bad
        good = [item for item in items if not item.defect]
        self.places[subtask] = [item.place for item in good]
        self.chances[subtask] = [_chance(self.task, item.row) for item in good]
        if not good:
            raise _NothingToScoreError(subtask)
        return [item.row for item in good]

    def _solved(self, config: Any, subject: str, examples: list[Item]) -> list[dict[str, Any]]:
        solved = [item.row for item in examples if not item.defect]
        if len(solved) < config.num_fewshot:
            raise ValueError(
                f"{self.task.name}: {len(solved)} solved examples of {subject or 'the task'}, but prompts need "
                f"{config.num_fewshot}; add some to its file of examples"
            )
        return solved


class _NothingToScoreError(Exception):
    """No item of a subject can be scored; the subject is left out, and its items are listed."""


def _chance(task: Task, row: dict[str, Any]) -> float:
    options = task.schema.options(row)
    return len(set(task.schema.gold(row))) / len(options) if options else 0.0


@functools.cache
def _open_definitions(folder: str) -> TaskManager:
    """Return lm-eval's definitions in one of its folders; reading all of them would take half a minute."""
    import lm_eval.tasks

    path = Path(lm_eval.tasks.__file__).parent / folder
    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=[path])


def _load(rows: _Rows, ours: dict[str, Any]) -> EvaluationTask:
    row = rows.task
    subtasks: dict[str, ConfigurableTask] = {}
    samples: dict[str, list[int]] = {}
    num_examples: dict[str, list[int]] = {}
    too_long: list[str] = []
    for subtask, subject in _subtasks(row, rows).items():
        try:
            task = _build(row, subtask, {**ours, "custom_dataset": rows.datasets_of(subject)})
        except _NothingToScoreError:
            continue
        counts = [task.num_examples(doc) for doc in task.eval_docs]
        fitting = [index for index, count in enumerate(counts) if count is not None]
        too_long += [place for place, count in zip(rows.places[subtask], counts, strict=True) if count is None]
        if not fitting:
            continue
        subtasks[subtask], samples[subtask] = task, fitting
        num_examples[subtask] = [count for count in counts if count is not None]
    unscorable = [*rows.unscorable, *(Unscorable(row.name, place, TOO_LONG) for place in too_long)]
    return EvaluationTask(
        name=row.name,
        metric=row.metric,
        num_fewshot=row.num_fewshot,
        subtasks=subtasks,
        samples=samples,
        places={subtask: rows.places[subtask] for subtask in subtasks},
        chances={subtask: rows.chances[subtask] for subtask in subtasks},
        num_examples=num_examples,
        unscorable=unscorable,
    )


def _subtasks(task: Task, rows: _Rows) -> dict[str, str]:
    """Return a task's subjects: lm-eval's names, mapped to the names in the files."""
    if not task.prefix:
        if rows.data is not None:
            rows.read_subjects()
        return {task.name: ""}
    known = {name for name in _open_definitions(task.folder).all_subtasks if name.startswith(task.prefix)}
    if rows.data is None:
        return dict.fromkeys(sorted(known), "")
    # lm-eval writes AGIEval's names with underscores.
    found = {f"{task.prefix}{subject.replace('-', '_')}": subject for subject in rows.read_subjects()}
    for subtask, subject in found.items():
        if subtask not in known:
            raise ValueError(
                f"{task.name}: unknown subject {subject!r}; lm-eval knows {len(known)}, such as {min(known)!r}"
            )
    return found


def _build(task: Task, subtask: str, ours: dict[str, Any]) -> Any:
    """Return lm-eval's task from its own definition, or from the table's, with rows from `ours`."""
    from flows.evaluation.harness_task import HarnessTask, SummaryTask, WholeTextTask

    kind = {"harness": HarnessTask, "whole_text": WholeTextTask, "summary": SummaryTask}[task.scoring]
    ours = {**ours, "num_fewshot": task.num_fewshot, "training_split": None}
    if task.definition:
        return kind({**task.definition, "task": subtask, **ours})
    # lm-eval only merges additional fields into a definition if a group names the task.
    group = {"group": "reprise", "task": [{**ours, "task": subtask, "class": kind}]}
    return _open_definitions(task.folder).load(group)["tasks"][subtask]


def _read_hub(task: Task, config: Any, split: str) -> tuple[list[Item], list[Item]]:
    """Return the items and the examples of one of lm-eval's tasks from the hub."""
    place = " ".join(filter(None, [config.dataset_path, config.dataset_name]))
    try:
        loaded = datasets.load_dataset(config.dataset_path, config.dataset_name, **(config.dataset_kwargs or {}))
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        # Raised by datasets if the hub is unreachable, or the data set is missing or no longer supported.
        [reason, *_] = f"{error}".splitlines() or [type(error).__name__]
        raise ValueError(
            f"{task.name}: cannot read {place} from the hub ({reason}); try again, or give its files with eval.data"
        ) from None
    parts = []
    for part in (split, config.fewshot_split if config.num_fewshot else None):
        rows = list(loaded[part])[: task.hub_limit] if part else []
        place = f"{config.dataset_path}:{part}"
        parts.append([make_item(task.name, f"{place}:{index}", "", row) for index, row in enumerate(rows)])
    return parts[0], parts[1]
