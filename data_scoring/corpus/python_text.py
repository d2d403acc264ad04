"""Text from the Python installation: documentation topics, docstrings and source of the standard library."""

import ast
import os
import sysconfig
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from data_scoring.corpus.documents import Document

KINDS = ("topics", "docstrings", "source")

# Generated tables and tests are noise compared with prose and code; site-packages is not the standard library.
_SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__", "pydoc_data", "encodings"}

# The fields of syntax nodes that hold statements, in their order, which all nodes share.
_BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")


def read_python_text(kind: str) -> Iterator[Document]:
    """Yield documents of one of `KINDS`, in the same order on every machine with the same Python.

    A document is, for topics, one topic of the language reference; for docstrings, those of one module, joined; for
    source, one module without its docstrings, so that no text is in two sources.
    """
    if kind == "topics":
        from pydoc_data import topics

        for number, name in enumerate(sorted(topics.topics), start=1):
            yield Document(topics.topics[name], topics.__file__, number)
        return
    for path in _modules():
        text = path.read_text(encoding="utf-8")
        docstrings, lines = _split_docstrings(text)
        document = "\n\n".join(docstrings) if kind == "docstrings" else lines
        if document.strip():
            yield Document(document, str(path), 1)


def _modules() -> Iterator[Path]:
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = []
    for folder, folders, files in os.walk(library):
        # Other packages are many more files.
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        paths += [Path(folder, name) for name in files if name.endswith(".py")]
    yield from sorted(paths)


def _split_docstrings(text: str) -> tuple[list[str], str]:
    docstrings: list[str] = []
    dropped: set[int] = set()
    for node in _walk_statements(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                docstrings.append(f"{getattr(node, 'name', '')}\n{docstring}".strip())
                dropped.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = [line for number, line in enumerate(text.splitlines(), start=1) if number not in dropped]
    return docstrings, "\n".join(lines)


def _walk_statements(module: ast.Module) -> Iterator[ast.AST]:
    """Yield the module and its statements in the order of `ast.walk`, without expressions, which are most nodes."""
    nodes: deque[ast.AST] = deque([module])
    while nodes:
        node = nodes.popleft()
        for block in _BLOCKS:
            nodes.extend(getattr(node, block, ()))
        yield node
