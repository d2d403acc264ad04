"""The index of lm-eval's tasks, groups and tags: finding a name without reading all of its 14,000 files.

lm-eval's own index of everything takes half a minute; here, the folder that defines a name is searched first.
"""

import difflib
import functools
import importlib.util
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_scoring.base.messages import one_line
from data_scoring.evaluation.task_files import is_task_path, task_definitions
from data_scoring.evaluation.tasks import other_tasks, task_names

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

# A value of `task`, `group` or `tag`, or an entry of a list, such as of tags.
_VALUE = re.compile(rb"^\s*(?:-|[\"']?(?:task|group|tag)[\"']?\s*:)\s*[\"']?([^\s\"'#\[\],]+)", re.MULTILINE)
_MOST_NEAR = 3
# Fields of a task that is defined in the group that names it.
_OWN_DATA = {"dataset_path", "custom_dataset"}


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError, in one line with near matches, for an entry of `eval.tasks` that names no task."""
    for name in other_tasks(names):
        if is_task_path(name):
            task_definitions(Path(name))
        elif name not in _places():
            near = difflib.get_close_matches(name, {*task_names(), *_places()}, _MOST_NEAR)
            meant = f"did you mean {' or '.join(near)}?" if near else "give a path to use a task file of your own"
            raise ValueError(
                f"eval.tasks: unknown task {name!r}, neither Reprise's ({', '.join(task_names())}) nor lm-eval's; "
                f"{meant}"
            )


@functools.cache
def _places() -> dict[str, Path]:
    """Return the folders below lm_eval/tasks in whose files values occur, by value: names of tasks among them."""
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None and spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0]) / "tasks"
    found: dict[str, Path] = {}
    for path in sorted(root.rglob("*.yaml")):
        folder = root / path.relative_to(root).parts[0]
        for value in _VALUE.findall(path.read_bytes()):
            found.setdefault(value.decode(errors="replace"), folder)
    return found


@functools.cache
def open_folder(folder: Path, with_defaults: bool = False) -> "TaskManager":
    """Return lm-eval's index of the task files in `folder`, with those of lm-eval itself if asked to."""
    import lm_eval.tasks

    return lm_eval.tasks.TaskManager(include_defaults=with_defaults, include_path=[folder])


def find_manager(name: str) -> "TaskManager":
    """Return an index that has the task, group or tag of lm-eval called `name`, and all of its members.

    Raises ValueError for an unknown name.
    """
    check_names([name])
    folder = _places()[name]
    if folder.is_dir():
        manager = open_folder(folder)
        # Tags may be given in any folder.
        if name in manager.all_tasks and name not in manager.all_tags and not lacks_members(manager, name):
            return manager
    manager = _open_all()
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, _MOST_NEAR)
        raise ValueError(f"eval.tasks: unknown task {name!r}; did you mean {' or '.join(near) or 'another'}?")
    return manager


@functools.cache
def _open_all() -> "TaskManager":
    import lm_eval.tasks

    return lm_eval.tasks.TaskManager()


def lacks_members(manager: "TaskManager", name: str) -> bool:
    """Return whether a group has members that are not in the index."""
    entry = manager.task_index[name]
    return any(
        member not in manager.task_index or (member != name and lacks_members(manager, member))
        for member in _members((entry.cfg or {}) if name in manager.all_groups else {})
    )


def _members(config: dict[str, Any]) -> Iterator[str]:
    """Yield the names that a group's `task` refers to, those in groups inside it included."""
    members = config.get("task")
    for member in members if isinstance(members, list) else []:
        if isinstance(member, str):
            yield member
        elif isinstance(member, dict) and "group" in member:
            yield from _members(member)
        elif isinstance(member, dict) and isinstance(member.get("task"), str) and not member.keys() & _OWN_DATA:
            yield member["task"]


@contextmanager
def explaining(name: str, what: str) -> Iterator[None]:
    """Raise ValueError, in one line, for whatever functions or templates of a task raise: it cannot be `what`."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - functions of task files raise anything
        raise load_error(name, error, what) from None


def load_error(name: str, error: BaseException, what: str = "loaded") -> ValueError:
    """Return the error, in one line, for a task that cannot be loaded, or whatever `what` says."""
    # Importing it takes a second.
    from datasets.exceptions import DatasetsError

    reason = one_line(error) or type(error).__name__
    if isinstance(error, ImportError) and error.name:
        return ValueError(
            f"eval.tasks: {name}: needs the package {error.name.partition('.')[0]}; install it ({reason})"
        )
    if isinstance(error, OSError | DatasetsError):
        return ValueError(
            f"eval.tasks: {name}: cannot read its data ({reason}); try again, or correct where the task looks for it"
        )
    if isinstance(error, KeyError):
        # lm-eval's registry returns None for a metric that it does not know.
        is_metric = error.args == (None,)
        reason = "lm-eval does not know a metric that it names" if is_metric else f"no field or name {reason}"
    return ValueError(f"eval.tasks: {name}: cannot be {what}: {reason} ({type(error).__name__}); repair or omit it")
