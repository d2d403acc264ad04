"""Where the documents of the training text come from: `documents.parquet`, a few bytes a document.

A row has the document's source, its file, its number there, and the place of its first token in the source's training
text. Rows are in the order of that text, so a binary search finds the document of any token; `ReadingOrder.find` gives
the place of a sample. Each row group is of one source.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_scoring.base.files import writing
from data_scoring.base.parquet import copy_row_groups, damaged

NAME = "documents.parquet"
_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string()),
        pa.field("file", pa.string()),
        pa.field("document", pa.int64()),
        pa.field("start", pa.int64()),
    ]
)
# Files are sorted and numbers ascend: differences are a byte or two.
_ENCODINGS = {"file": "DELTA_BYTE_ARRAY", "document": "DELTA_BINARY_PACKED", "start": "DELTA_BINARY_PACKED"}
# Of 16,384 documents each.
_MOST_GROUPS_IN_MEMORY = 256


class Document(NamedTuple):
    """A document: its text, and where it is.

    file: the file, or what else the source names; of an archive, with the member's name. number: from 1: the line (JSON
    lines, text by lines), the element (a JSON array), the row (Parquet, `datasets`) or the paragraph.
    """

    text: str
    file: str
    number: int


class Rows(NamedTuple):
    """Documents of a source: their files, their numbers, and the places of their first tokens, [n] int64 each."""

    files: list[str]
    numbers: NDArray[np.int64]
    starts: NDArray[np.int64]


class Origin(NamedTuple):
    """Where a stretch of training text comes from: the document in which it begins, and how many it has a part of.

    first_token: the number of the stretch's first token in the document, from 0.
    """

    file: str
    document: int
    first_token: int
    num_documents: int


def name_of_file(name: str) -> str:
    """Return a file's name as text, with bytes that are not UTF-8 escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def write_documents(path: Path, sources: Iterable[tuple[str, Iterator[Rows]]]) -> None:
    """Write the documents of `sources`, pairs of a name and the documents in reading order, to `path`."""
    with writing(path) as temporary, _writer(temporary) as writer:
        for name, chunks in sources:
            for rows in chunks:
                if len(rows.numbers):
                    columns = [
                        pa.array([name] * len(rows.numbers)),
                        pa.array(rows.files),
                        pa.array(rows.numbers),
                        pa.array(rows.starts),
                    ]
                    writer.write_table(pa.table(columns, schema=_SCHEMA))


def join_documents(tables: Sequence[Path], path: Path) -> None:
    """Write the documents of several files that `write_documents` wrote to `path`, in order."""
    with writing(path) as temporary, _writer(temporary) as writer:
        copy_row_groups(tables, writer)


def _writer(path: Path) -> pq.ParquetWriter:
    return pq.ParquetWriter(path, _SCHEMA, compression="zstd", use_dictionary=["source"], column_encoding=_ENCODINGS)


@dataclass(frozen=True)
class _Group:
    files: pa.Array
    numbers: NDArray[np.int64]
    starts: NDArray[np.int64]


class DocumentTable:
    """The documents in a file that `write_documents` wrote, opened read-only. Raises ValueError if it is damaged."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, Lock()
        self._groups: dict[int, _Group] = {}
        try:
            self._file = pq.ParquetFile(path)
            metadata = self._file.metadata
            groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
            sources = [group.column(0).statistics.min for group in groups]
            starts = [group.column(3).statistics.min for group in groups]
        except (pa.ArrowException, OSError, AttributeError) as error:
            raise damaged(path, error) from None
        counts = [group.num_rows for group in groups]
        self._sources: dict[str, NDArray[np.int64]] = {
            name: np.flatnonzero(np.array(sources) == name) for name in dict.fromkeys(sources)
        }
        self._starts = np.array(starts, np.int64)
        self._first_rows = np.cumsum([0, *counts])

    def find(self, source: str, first: int, last: int) -> Origin:
        """Return where the tokens from place `first` to `last` of the training text of `source` come from."""
        group, row = self._locate(source, first)
        last_group, last_row = self._locate(source, last)
        num_documents = self._first_rows[last_group] + last_row - self._first_rows[group] - row + 1
        rows = self._read(group)
        return Origin(str(rows.files[row]), int(rows.numbers[row]), first - int(rows.starts[row]), int(num_documents))

    def _locate(self, source: str, place: int) -> tuple[int, int]:
        """Return the row group, and the row in it, of the document that has the token at `place`."""
        groups = self._sources[source]
        group = int(groups[np.searchsorted(self._starts[groups], place, side="right") - 1])
        return group, int(np.searchsorted(self._read(group).starts, place, side="right")) - 1

    def _read(self, number: int) -> _Group:
        with self._lock:
            if number not in self._groups:
                if len(self._groups) >= _MOST_GROUPS_IN_MEMORY:
                    self._groups.clear()
                try:
                    table = self._file.read_row_group(number, columns=["file", "document", "start"])
                except (pa.ArrowException, OSError) as error:
                    raise damaged(self._path, error) from None
                files, numbers, starts = (column.combine_chunks() for column in table.columns)
                self._groups[number] = _Group(files, numbers.to_numpy(), starts.to_numpy())
            return self._groups[number]
