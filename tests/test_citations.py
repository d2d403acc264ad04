"""Papers are cited by the names of their parts: numbers differ between the versions of a paper."""

import re
from pathlib import Path

import pytest

_NUMBERED = re.compile(
    r"\b(sections?|figures?|fig\.|appendix|equations?|eq\.)\s+\(?(\d|[A-F]\b)|\(the paper, \d", re.IGNORECASE
)
_ROOTS = ("data_scoring", "flows", "trainer", "kernels", "docs", "configs")


@pytest.mark.parametrize("root", _ROOTS)
def test_no_part_of_a_paper_is_cited_by_number(root: str) -> None:
    files = [path for path in Path(root).rglob("*") if path.suffix in (".py", ".md", ".yaml")]
    assert files
    found = [(str(path), match.group()) for path in files for match in _NUMBERED.finditer(path.read_text("utf-8"))]
    assert found == []
