"""Exact duplicates: documents with the digest of an earlier one, found in buckets of digests.

Each part writes its documents' digests bucket by bucket; each group of buckets is searched in all parts, by itself. So
memory is that of one group, whatever the size of the corpus.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_scoring.base.engine import Count
from data_scoring.base.files import writing

_DIGEST = np.dtype([("digest", "<u8"), ("row", "<i8")])
NUM_BUCKETS = 256
_BUCKET_SHIFT = np.uint64(56)
# Rows that are sorted into buckets at a time.
_RUN_DOCUMENTS = 1 << 18
# Documents that are searched at a time, which takes about 60 bytes each.
_GROUP_DOCUMENTS = 1 << 22


def write_digests(documents: Iterator[np.ndarray], path: Path, bounds_path: Path) -> None:
    """Write the digests of `documents`, arrays with the field `digest`, to `path`, in runs that are sorted by bucket.

    `bounds_path`: an array [num_runs, NUM_BUCKETS + 1] int64: where each bucket of a run begins in the file.
    """
    bounds: list[NDArray[np.int64]] = [np.empty((0, NUM_BUCKETS + 1), np.int64)]
    done = 0
    with writing(path) as temporary, temporary.open("wb") as file:
        for digests in _runs(documents):
            buckets = digests >> _BUCKET_SHIFT
            order = np.argsort(buckets, kind="stable")
            run = np.empty(len(digests), _DIGEST)
            run["digest"], run["row"] = digests[order], done + order
            file.write(run.tobytes())
            starts = np.searchsorted(buckets[order], np.arange(NUM_BUCKETS + 1, dtype=np.uint64))
            bounds.append(done + starts[None].astype(np.int64))
            done += len(digests)
    with writing(bounds_path) as temporary, temporary.open("wb") as file:
        np.save(file, np.concatenate(bounds))


def _runs(documents: Iterator[np.ndarray]) -> Iterator[NDArray[np.uint64]]:
    waiting: list[NDArray[np.uint64]] = []
    for rows in documents:
        waiting.append(rows["digest"].copy())
        if sum(map(len, waiting)) >= _RUN_DOCUMENTS:
            yield np.concatenate(waiting)
            waiting = []
    if waiting:
        yield np.concatenate(waiting)


def groups_of_buckets(num_documents: int) -> list[range]:
    """Return groups of buckets, each to be searched by itself, for so many documents in all."""
    count = min(NUM_BUCKETS, max(1, -(-num_documents // _GROUP_DOCUMENTS)))
    starts = [NUM_BUCKETS * number // count for number in range(count + 1)]
    return [range(start, stop) for start, stop in pairwise(starts)]


def _duplicates_paths(staging: Path, buckets: range) -> tuple[Path, Path]:
    # Names of sources do not start with an underscore.
    name = f"_duplicates.{buckets.start:03d}"
    return staging / name, staging / f"{name}.bounds.npy"


def find_duplicates(buckets: range, count: Count, *, staging: Path, parts: Sequence[Path]) -> None:
    """Write which documents have a digest in `buckets` that an earlier one has.

    `parts`: the prefixes of the names of the parts' files, in order. A file holds the documents' numbers in their
    parts, int64, another one where those of each part begin in it, [num_parts + 1] int64.
    """
    digests, rows, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for number, prefix in enumerate(parts):
        for found in _read(prefix, buckets):
            digests.append(found["digest"])
            rows.append(found["row"])
            owners.append(np.full(len(found), number, np.int64))
    digest, row, owner = np.concatenate(digests), np.concatenate(rows), np.concatenate(owners)
    del digests, rows, owners
    # Buckets of one run come after each other, and equal digests are in one bucket, so they are in document order.
    is_first = np.zeros(len(digest), bool)
    is_first[np.unique(digest, return_index=True)[1]] = True
    row, owner = row[~is_first], owner[~is_first]
    order = np.lexsort((row, owner))
    bounds = np.searchsorted(owner[order], np.arange(len(parts) + 1))
    rows_path, bounds_path = _duplicates_paths(staging, buckets)
    with writing(rows_path) as temporary, temporary.open("wb") as file:
        file.write(row[order].astype("<i8").tobytes())
    with writing(bounds_path) as temporary, temporary.open("wb") as file:
        np.save(file, bounds)
    count(len(digest))


def _read(prefix: Path, buckets: range) -> Iterator[np.ndarray]:
    bounds = np.load(prefix.with_name(f"{prefix.name}.digest-bounds.npy"))
    with prefix.with_name(f"{prefix.name}.digests").open("rb") as file:
        for run in bounds:
            start, stop = int(run[buckets.start]), int(run[buckets.stop])
            file.seek(start * _DIGEST.itemsize)
            yield np.fromfile(file, _DIGEST, stop - start)


def read_duplicates(staging: Path, groups: Sequence[range], part: int) -> NDArray[np.int64]:
    """Return the numbers, ascending, of those documents of a part that are duplicates, [n] int64."""
    found = [np.empty(0, np.int64)]
    for buckets in groups:
        rows_path, bounds_path = _duplicates_paths(staging, buckets)
        start, stop = np.load(bounds_path, mmap_mode="r")[part : part + 2].tolist()
        found.append(np.fromfile(rows_path, "<i8", stop - start, offset=8 * start))
    return np.sort(np.concatenate(found))
