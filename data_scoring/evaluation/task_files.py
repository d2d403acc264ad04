"""Task files of lm-eval's format: which ones a user names, and every file that they read.

Nothing is executed here: a `!function` stays a name.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from data_scoring.base.messages import one_line

SUFFIXES = (".yaml", ".yml")
# Loaders of `datasets` for files, which `dataset_path` may name.
FILE_LOADERS = ("json", "csv", "parquet", "text", "arrow", "xml")


class _Loader(yaml.SafeLoader):
    """Reads `!function module.name` as a `_Function`."""


class _Function(str):
    """The name of a function in a module beside a task's file."""


def _function(loader: _Loader, node: yaml.ScalarNode) -> _Function:
    return _Function(loader.construct_scalar(node))


_Loader.add_constructor("!function", _function)


def is_task_path(name: str) -> bool:
    """Return whether an entry of `eval.tasks` is the path of a task file, or of a folder of them, and no name."""
    return "/" in name or name.endswith(SUFFIXES)


def task_definitions(path: Path) -> list[Path]:
    """Return the task files at `path`: the file itself, or those below a folder.

    Raises ValueError if there are none.
    """
    if path.is_dir():
        found = sorted(file for file in path.rglob("*.yaml") if _defines_task(file))
        if not found:
            raise ValueError(f"eval.tasks: {path}: holds no task file, a .yaml file with `task` or `group`; add one")
        return found
    if not path.is_file():
        raise ValueError(f"eval.tasks: {path}: no such file or folder; correct the path")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"eval.tasks: {path}: is no .yaml file; give a task file of lm-eval's format, or a folder")
    if not _defines_task(path):
        raise ValueError(f"eval.tasks: {path}: defines neither a `task` nor a `group`; add one, or give another file")
    return [path]


def files_of_task(path: Path) -> list[Path]:
    """Return every file that the task files at `path` read: included ones, modules, and local data that exist."""
    found: dict[Path, None] = {}
    for definition in task_definitions(path):
        folder = definition.parent
        # A group names other files of its folder by their tasks.
        members = sorted(folder.rglob("*.yaml")) if "group" in read_task_file(definition) else []
        for file in [definition, *members]:
            found |= dict.fromkeys(_files(file))
    return list(found)


def locate_data(name: str, folder: Path) -> Path:
    """Return the path of a data file that a task file in `folder` names: beside it, or else in the working folder."""
    return folder / name if (folder / name).exists() else Path(name)


def read_task_file(path: Path) -> dict[str, Any]:
    """Return the content of a task file. Raises ValueError if it is not YAML, or no mapping."""
    try:
        content = yaml.load(path.read_bytes(), Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML ({one_line(error)}); repair the file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); correct the path") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no mapping of fields; write a task of lm-eval's format")
    return content


def _defines_task(path: Path) -> bool:
    content = read_task_file(path)
    return "task" in content or "group" in content


def _files(path: Path, seen: tuple[Path, ...] = ()) -> Iterator[Path]:
    if path in seen:
        raise ValueError(f"{path}: includes itself; remove the circle")
    yield path
    content = read_task_file(path)
    included = content.get("include", [])
    for name in included if isinstance(included, list) else [included]:
        yield from _files(path.parent / str(name), (*seen, path))
    for function in _functions(content):
        module = path.parent / f"{function.rpartition('.')[0].replace('.', '/')}.py"
        if module.is_file():
            yield module
    yield from _data(content, path.parent)


def _functions(value: Any) -> Iterator[_Function]:
    if isinstance(value, _Function):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _functions(part)


def _data(content: dict[str, Any], folder: Path) -> Iterator[Path]:
    arguments = content.get("dataset_kwargs")
    named = arguments.get("data_files") if isinstance(arguments, dict) else None
    names = [content.get("dataset_path"), *_strings(named)]
    for name in names:
        if not isinstance(name, str) or "://" in name or name in FILE_LOADERS:
            continue
        place = locate_data(name, folder)
        if place.is_file():
            yield place
        elif place.is_dir():
            yield from sorted(file for file in place.rglob("*") if file.is_file())


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
