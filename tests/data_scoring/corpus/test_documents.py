"""The table of documents finds, for any stretch of tokens, what counting through all documents finds."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data_scoring.corpus import documents
from data_scoring.corpus.documents import DocumentTable, Origin, Rows, name_of_file, write_documents


@pytest.mark.parametrize("most_groups", [1, 256])
def test_documents_are_found_in_every_row_group(
    tmp_path: Path, most_groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "_MOST_GROUPS_IN_MEMORY", most_groups)
    generator = np.random.default_rng(0)
    lengths = {name: generator.integers(1, 9, 300) for name in ("b", "a", "c")}
    numbers = {name: np.cumsum(generator.integers(1, 4, 300)) for name in lengths}

    def chunks(name: str) -> list[Rows]:
        starts, files = np.cumsum(lengths[name]) - lengths[name], [f"{name}-{number // 90}" for number in range(300)]
        bounds = [0, 7, 7, 100, 101, 300]
        return [Rows(files[a:b], numbers[name][a:b], starts[a:b]) for a, b in pairwise(bounds)]

    path = tmp_path / "documents.parquet"
    empty = iter([Rows([], np.empty(0, np.int64), np.empty(0, np.int64))])
    write_documents(path, [("none", empty), *((name, iter(chunks(name))) for name in lengths)])
    table = DocumentTable(path)
    for name, counts in lengths.items():
        owners = np.repeat(np.arange(300), counts)
        for first in generator.integers(0, len(owners), 60).tolist():
            last = min(len(owners) - 1, first + int(generator.integers(0, 900)))
            owner = int(owners[first])
            begins = int(np.argmax(owners == owner))
            count = int(owners[last]) - owner + 1
            expected = Origin(f"{name}-{owner // 90}", int(numbers[name][owner]), first - begins, count)
            assert table.find(name, first, last) == expected


def test_names_of_files_are_text() -> None:
    assert name_of_file("a/文.txt") == "a/文.txt"
    assert name_of_file(b"a\xff.txt".decode("utf-8", "surrogateescape")) == "a\\xff.txt"
