"""Text of the Python installation: which modules it is of, and what is taken from them."""

import sysconfig
from pathlib import Path

import pytest

from data_scoring.corpus.python_text import read_python_text

MODULE = '''"""Of the module."""
if condition:
    class Outer:
        """Of a class
        in a branch."""
        def method(self):
            """Of a method."""
            return [lambda: """No docstring."""]
else:
    def otherwise():
        """Of the other branch."""
try:
    pass
except ValueError:
    async def handled():
        """Of a handler."""
else:
    with open("file"):
        def inside():
            """In a context."""
finally:
    match value:
        case 1:
            def matched():
                """Of a case."""
def last():
    """Of a function."""
    def inner():
        """Of an inner function."""
        x = 1
'''
# By depth, then in the order of the text: the order of `ast.walk`. A handler, and a case, is one level of its own.
DOCSTRINGS = """Of the module.

last
Of a function.

Outer
Of a class
in a branch.

otherwise
Of the other branch.

inner
Of an inner function.

method
Of a method.

handled
Of a handler.

inside
In a context.

matched
Of a case."""


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    return tmp_path


def test_docstrings_are_those_of_all_definitions_and_are_not_in_the_source(library: Path) -> None:
    (library / "module.py").write_text(MODULE)
    assert list(read_python_text("docstrings")) == [(DOCSTRINGS, str(library / "module.py"), 1)]
    [source] = read_python_text("source")
    docstrings = [line for line in MODULE.splitlines() if "Of " in line or "In a context" in line]
    assert len(docstrings) == 9
    assert not any(line in source.text for line in docstrings)
    assert 'return [lambda: """No docstring."""]' in source.text


def test_modules_are_in_order_without_tests_and_other_packages(library: Path) -> None:
    names = ["b.py", "a/z.py", "a.py", "a/b/c.py", "site-packages/x.py", "a/test/y.py", "encodings/e.py", "a/notes.txt"]
    for name in names:
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(f'"""{name}"""')
    ordered = ["a/b/c.py", "a/z.py", "a.py", "b.py"]
    assert list(read_python_text("docstrings")) == [(name, str(library / name), 1) for name in ordered]
