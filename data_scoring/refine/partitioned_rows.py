"""Files of rows in partitions: each task writes the rows of all partitions, and reads one partition of all files."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_scoring.base.files import writing


def write_partitions(
    path: Path, num_partitions: int, chunks: Iterable[tuple[NDArray[np.int64], NDArray[np.int64]]]
) -> None:
    """Write rows to `path`, atomically; memory does not depend on their number.

    `chunks` yields (partitions, [n] int64, ascending over all chunks; rows, [n, 2] int64). The file is `num_partitions`
    + 1 int64, the first row of each partition and the number of rows, and then the rows.
    """
    counts = np.zeros(num_partitions, np.int64)
    with writing(path) as temporary, temporary.open("wb") as file:
        file.write(bytes(_header_bytes(num_partitions)))
        for partitions, rows in chunks:
            counts += np.bincount(partitions, minlength=num_partitions)
            file.write(np.ascontiguousarray(rows, "<i8").data)
        file.seek(0)
        file.write(np.concatenate([[0], np.cumsum(counts)]).astype("<i8").data)


def read_partition(path: Path, num_partitions: int, number: int) -> NDArray[np.int64]:
    """Return the rows of partition `number`, [n, 2] int64, of a file that `write_partitions` wrote."""
    first, last = np.fromfile(path, "<i8", 2, offset=8 * number).tolist()
    rows = np.fromfile(path, "<i8", 2 * (last - first), offset=_header_bytes(num_partitions) + 16 * first)
    return np.asarray(rows.reshape(-1, 2), np.int64)


def _header_bytes(num_partitions: int) -> int:
    return 8 * (num_partitions + 1)
