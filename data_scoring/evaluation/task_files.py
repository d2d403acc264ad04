"""Task files of lm-eval's format: which ones a user names, and every file that they read.

Nothing is executed here: a `!function` stays a name.
"""

import glob
from collections.abc import Iterable, Iterator
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
            found |= dict.fromkeys(_files(file, file.parent))
    return list(found)


def locate_data(name: str, folder: Path) -> Path:
    """Return the path, or pattern, of data that a task file in `folder` names: beside it, or in the working folder."""
    beside = folder / name
    return beside if beside.exists() or _matching(beside) else Path(name)


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


def _files(path: Path, folder: Path, seen: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield a file and those that it reads. folder: of the task, where data lie, also those an included file names."""
    if path in seen:
        raise ValueError(f"{path}: includes itself; remove the circle")
    yield path
    content = read_task_file(path)
    included = content.get("include", [])
    for name in included if isinstance(included, list) else [included]:
        yield from _files(path.parent / str(name), folder, (*seen, path))
    for function in _functions(content):
        # lm-eval resolves links first.
        module = path.resolve().parent / f"{function.rpartition('.')[0].replace('.', '/')}.py"
        if module.is_file():
            yield module
    for name in _data(content):
        yield from _matches(locate_data(name.removeprefix("file://"), folder))


def _functions(value: Any) -> Iterator[_Function]:
    if isinstance(value, _Function):
        yield value
    for part in _parts(value):
        yield from _functions(part)


def _data(value: Any) -> Iterator[str]:
    """Yield the local paths of data that a task file names, for itself or for the tasks of its group."""
    if isinstance(value, dict):
        arguments = value.get("dataset_kwargs")
        named = [arguments.get(key) for key in ("data_files", "data_dir")] if isinstance(arguments, dict) else []
        for name in _strings([value.get("dataset_path"), *named]):
            if name not in FILE_LOADERS and ("://" not in name or name.startswith("file://")):
                yield name
    for part in _parts(value):
        yield from _data(part)


def _matches(place: Path) -> Iterator[Path]:
    """Yield the files at a path, or at those that it matches as a pattern, and below folders."""
    for found in [place] if place.exists() else _matching(place):
        if found.is_file():
            yield found
        elif found.is_dir():
            yield from sorted(file for file in found.rglob("*") if file.is_file())


def _matching(pattern: Path) -> list[Path]:
    """Return the paths that match a pattern, which may be absolute."""
    return sorted(map(Path, glob.glob(str(pattern), recursive=True)))  # noqa: PTH207 - Path.glob takes no absolute one


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for part in _parts(value):
        yield from _strings(part)


def _parts(value: Any) -> Iterable[Any]:
    """Return the values in a dictionary or list; none for other values."""
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
