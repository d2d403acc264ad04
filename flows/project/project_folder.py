"""A new folder to work in: a configuration to edit, examples, Prefect's files, the pages, and a sample of text."""

import importlib.resources
import json
import os
from collections.abc import Iterator
from importlib.resources.abc import Traversable
from pathlib import Path

from data_scoring.corpus.python_text import read_python_text

# Names in the template that differ in the folder: a .gitignore would apply to the template itself.
_NAMES = {"gitignore": ".gitignore"}


def make_project(folder: Path) -> list[Path]:
    """Return the files that were written to `folder`, which is made if it does not exist, relative to it.

    Raises ValueError, and writes nothing, if one of them exists, or a file in place of a folder.
    """
    if folder.is_file():
        raise ValueError(f"{folder}: is a file; choose another folder")
    texts = {Path(name): text for name, text in _texts()}
    needed = {parent for path in texts for parent in path.parents if not (folder / parent).is_dir()}
    if existing := [str(path) for path in (*texts, *sorted(needed)) if os.path.lexists(folder / path)]:
        them = "it" if len(existing) == 1 else "them"
        raise ValueError(f"{folder}: has {', '.join(existing)} already; move {them} away, or choose another folder")
    for path, text in texts.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    return list(texts)


def _texts() -> Iterator[tuple[str, str]]:
    """Yield the name of each file, relative to the folder, and its text."""
    yield from _template(importlib.resources.files("flows.project") / "template", "")
    lines = [json.dumps({"text": document.text}) for document in read_python_text("topics")]
    yield "data/sample.jsonl", "".join(f"{line}\n" for line in lines)


def _template(folder: Traversable, prefix: str) -> Iterator[tuple[str, str]]:
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _template(entry, f"{prefix}{entry.name}/")
        else:
            yield prefix + _NAMES.get(entry.name, entry.name), entry.read_text(encoding="utf-8")
