"""Loading of tasks that are not in Reprise's table: lm-eval's, by name, and those of task files."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.models.utils import normalize_gen_kwargs

from data_scoring.evaluation.items import ItemText
from data_scoring.evaluation.task_files import is_task_path, read_task_file, task_definitions
from data_scoring.evaluation.tasks import TASKS
from flows.evaluation.harness_task import Fits
from flows.evaluation.open_task import OpenTask, UnusableTaskError, opened_tasks
from flows.evaluation.task_index import find_manager, lacks_members, load_error, open_folder
from flows.evaluation.task_loading import EvaluationTask

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

# Metrics by which guessing has a known score.
_CHOICES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")
_MOST_NAME_BYTES = 200
_KINDS = ("loglikelihood", "loglikelihood_rolling", "multiple_choice", "generate_until")


def load_open_tasks(entry: str, data: Path | None, limit: int | None, fits: Fits) -> list[EvaluationTask]:
    """Return the tasks that an entry of `eval.tasks` stands for: a group with scores of its own is one task.

    data: folder with copies of the hub's data sets; None: the hub. limit: use only the first items of each task.
    fits: whether a prompt with its continuations fits into the model; examples are dropped from those that do not.

    Raises ValueError, in one line, for a task that is unknown or cannot be loaded or evaluated.
    """
    with opened_tasks(fits, data) as kind:
        found: list[EvaluationTask] = []
        for name, loaded in _load(entry, kind):
            found += _arrange(entry, name, loaded["tasks"], loaded.get("groups", {}), limit)
        return found


def open_task_texts(task: EvaluationTask) -> Iterator[ItemText]:
    """Yield the text of every item of a task: its question, then its options or its answer, one per line."""
    for subtask, harness_task in task.subtasks.items():
        for index in task.samples[subtask]:
            doc = harness_task.eval_docs[index]
            choices = _choices(harness_task, doc)
            parts = [harness_task.doc_to_text(doc), *(choices or [harness_task.doc_to_target(doc)])]
            text = "\n".join(part for part in parts if isinstance(part, str) and part.strip())
            yield ItemText(task.name, task.places[subtask][index], text)


def _load(entry: str, kind: type[OpenTask]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what an entry names, with what lm-eval loads for it: tasks and groups by name."""
    if not is_task_path(entry):
        manager = find_manager(entry)
        _check_safe(entry, manager.task_index[entry].cfg or {})
        yield entry, _load_spec(manager, entry, entry)
        return
    found = [(path, read_task_file(path)) for path in task_definitions(Path(entry))]
    members = {member for _, content in found for member in _named(content)}
    for path, content in found:
        name = content.get("group", content.get("task"))
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"eval.tasks: {path}: its task has no name; set `task` or `group` to one")
        _check_safe(name, content)
        # The members of a folder's groups are asked as parts of these.
        if len(found) == 1 or name not in members:
            # Of a group in a file, lm-eval takes the list of its members for its name.
            spec = name if "group" in content else str(path)
            kind.folder = path.parent
            yield name, _load_spec(_manager_of(path, name, content), spec, f"{path}: {name}")


def _named(content: dict[str, Any]) -> Iterator[str]:
    """Yield the names of a group's members."""
    members = content.get("task") if "group" in content else None
    for member in members if isinstance(members, list) else []:
        if isinstance(member, str):
            yield member
        elif isinstance(member, dict):
            yield from (str(member[key]) for key in ("task", "group") if isinstance(member.get(key), str))


def _manager_of(path: Path, name: str, content: dict[str, Any]) -> "TaskManager":
    """Return an index of the files beside `path`, with lm-eval's own if a group names some of these."""
    manager = open_folder(path.parent.resolve())
    is_group = "group" in content and name in manager.all_groups
    return open_folder(path.parent.resolve(), True) if is_group and lacks_members(manager, name) else manager


def _check_safe(name: str, content: dict[str, Any]) -> None:
    """Raise ValueError for a task that lm-eval marks as unsafe."""
    if content.get("unsafe_code"):
        raise ValueError(f"eval.tasks: {name}: executes code that the model writes (unsafe_code); leave it out")


def _load_spec(manager: "TaskManager", spec: str, place: str) -> dict[str, Any]:
    try:
        return dict(manager.load(spec))
    except UnusableTaskError:
        raise
    except Exception as error:  # noqa: BLE001 - functions of task files raise anything
        raise load_error(place, error) from None


def _arrange(
    entry: str, name: str, tasks: dict[str, Any], groups: dict[str, Any], limit: int | None
) -> Iterator[EvaluationTask]:
    """Yield one task for a group that aggregates a metric; of another group, and of a tag, one for each member."""
    for task_name, task in tasks.items():
        _check_kind(task_name, task)
    group = groups.get(name)
    if group is None:
        for task_name, task in tasks.items():
            yield _make(entry, task_name, {task_name: task}, {}, _first_metric(task_name, task), limit)
    elif group.has_aggregation:
        yield _make(entry, name, tasks, {name: group}, str(group.aggregate_metric_list[0].metric), limit)
    else:
        for child in group:
            is_group = hasattr(child, "get_all_tasks")
            members = {each.task_name: each for each in (child.get_all_tasks() if is_group else [child])}
            yield from _arrange(entry, child.name if is_group else child.task_name, members, groups, limit)


def _first_metric(name: str, task: Any) -> str:
    """Return the first metric of a task's definition. Raises ValueError if it computes none."""
    metrics = [metric for metric in task.aggregation() if metric != "bypass"]
    if not metrics:
        raise ValueError(f"eval.tasks: {name}: computes no metric; name one in its metric_list")
    return str(metrics[0])


def _check_name(name: str) -> None:
    """Raise ValueError if answers of a task cannot be stored under its name."""
    if name in TASKS:
        raise ValueError(
            f"eval.tasks: the task {name!r} has the name of one of Reprise's own; give it another, or omit it"
        )
    if "/" in name or not name.isprintable() or len(name.encode()) > _MOST_NAME_BYTES:
        raise ValueError(f"eval.tasks: the task {name!r} has a name that no file can have; give it another")


def _check_kind(name: str, task: Any) -> None:
    """Raise ValueError for a task that cannot be evaluated."""
    if getattr(task, "UNSAFE_CODE", False):
        _check_safe(name, {"unsafe_code": True})
    if task.OUTPUT_TYPE not in _KINDS:
        raise ValueError(
            f"eval.tasks: {name}: has the type {task.OUTPUT_TYPE!r}, but only {', '.join(_KINDS)} can be evaluated; "
            "leave it out"
        )
    if task.OUTPUT_TYPE == "generate_until" and normalize_gen_kwargs(task.config.generation_kwargs or {})["do_sample"]:
        raise ValueError(
            f"eval.tasks: {name}: draws its answers, but only greedy generation can be evaluated; set do_sample: false "
            "in its generation_kwargs, or omit it"
        )


def _make(
    entry: str, name: str, tasks: dict[str, Any], groups: dict[str, Any], metric: str, limit: int | None
) -> EvaluationTask:
    _check_name(name)
    samples, places, chances = {}, {}, {}
    for subtask, task in tasks.items():
        docs = task.eval_docs
        samples[subtask] = list(range(len(docs) if limit is None else min(limit, len(docs))))
        places[subtask] = [f"{_source(task)}:{index}" for index in range(len(docs))]
        is_choice = metric in _CHOICES and task.OUTPUT_TYPE == "multiple_choice"
        chances[subtask] = [_chance(task, docs[index]) for index in samples[subtask]] if is_choice else []
    shots = {int(task.get_config("num_fewshot") or 0) for task in tasks.values()}
    return EvaluationTask(
        name=name,
        metric=metric,
        num_fewshot=max(shots),
        subtasks=tasks,
        samples=samples,
        places=places,
        chances=chances,
        num_examples={},
        unscorable=[],
        entry=entry,
        groups=groups,
    )


def _source(task: Any) -> str:
    """Return where the items of a task come from: the data set or its only file, and the split."""
    arguments = task.get_config("dataset_kwargs") or {}
    files = arguments.get("data_files")
    split = task.get_config("test_split") or task.get_config("validation_split")
    if isinstance(files, dict):
        files = files.get(split, files)
    place = Path(files).name if isinstance(files, str) else task.DATASET_PATH
    return f"{place}:{split}"


def _choices(task: Any, doc: dict[str, Any]) -> Sequence[str]:
    return task.doc_to_choice(doc) if task.get_config("doc_to_choice") is not None else []


def _chance(task: Any, doc: dict[str, Any]) -> float:
    choices, gold = _choices(task, doc), task.doc_to_target(doc)
    return (len(set(gold)) if isinstance(gold, list) else 1) / len(choices) if choices else 0.0
