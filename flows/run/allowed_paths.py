"""The paths that a deployment's flows may use: those inside the folders that its owner allows."""

import re
from pathlib import Path

from pydantic import BaseModel

from data_scoring.base.user_paths import typed, user_paths
from data_scoring.corpus.source_files import match_path
from data_scoring.evaluation.task_files import files_of_task
from flows.run.config import RunConfig

# An entry of `eval.tasks` or `eval.training_tasks`.
_TASKS = re.compile(r"\b(training_)?tasks\.\d+$")


def check_paths(config: RunConfig, allowed: list[Path]) -> None:
    """Raise ValueError where `config` reads or writes a path outside the `allowed` folders."""
    check_section(config, "", allowed)


def check_section(section: BaseModel, prefix: str, allowed: list[Path]) -> None:
    """Raise ValueError where a section of the configuration names a path outside the `allowed` folders.

    prefix: of its fields' names. Task files may not read or execute files outside, either.
    """
    for field, path in user_paths(section, prefix):
        check_path(field, path, allowed)
        if _TASKS.search(field):
            for file in files_of_task(Path(path)):
                _check_inside(field, f"{typed(path)} ({file})", file.resolve(), allowed)


def check_path(field: str, path: str, allowed: list[Path]) -> None:
    """Raise ValueError where `path`, the value of `field`, lies outside the `allowed` folders, links resolved."""
    if "://" in path or "::" in path or str(typed(path)).startswith("~"):
        raise ValueError(
            f"{field}: {typed(path)!r} is not a plain path; deployed flows may only use plain paths; give one"
        )
    # A source's path may be a pattern, or a folder with linked ones in it.
    files = match_path(path) if field.startswith("corpus.sources.") else []
    for place in [path, *files]:
        _check_inside(field, str(typed(path)), Path(place).resolve(), allowed)


def _check_inside(field: str, path: str, resolved: Path, allowed: list[Path]) -> None:
    if not any(resolved.is_relative_to(folder.resolve()) for folder in allowed):
        places = ", ".join(str(folder.resolve()) for folder in allowed)
        raise ValueError(
            f"{field}: {path!r} lies outside the folders that flows may use ({places}); choose a path inside, "
            "or allow the folder when starting the worker (`reprise serve --allow FOLDER`)"
        )
