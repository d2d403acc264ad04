"""Moving samples to their random places: each part is sorted by shard and place, each shard is put together from these.

Both read and write stretches of files, in bounded memory. The shards' files are written in one go.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from data_scoring.base.engine import Count
from data_scoring.base.files import checksum, writing
from data_scoring.corpus.documents import Rows, write_documents
from data_scoring.corpus.indexed import write_index
from data_scoring.corpus.packing import ShardAssignment, write_samples
from data_scoring.corpus.roles import TRAIN, VALIDATION, blocks_with_roles, documents_with_roles
from data_scoring.corpus.tokenise import StagedPart

# A sample, or what a part has of it: its place in its shard, where the tokens begin in the sample, and their number.
_ENTRY = np.dtype([("place", "<i8"), ("offset", "<i8"), ("length", "<i8")])
# The endings of the files of a part that is scattered.
_SCATTERED = ("validation", "scattered", "entries", "bounds.npy", "located.parquet")
# Tokens that are sorted at a time.
_RUN_TOKENS = 1 << 25
# Bytes of a shard that are put together at a time: an eighth of it, so that no part is read in too many pieces.
_WINDOW_BYTES = 1 << 27
_LARGEST_WINDOW_BYTES = 1 << 29


@dataclass(frozen=True)
class PlacedPart:
    """A part whose documents have roles, and its place in the training text of its source.

    source: the source's number. held_out: see `Roles`. first_token: how many tokens of training text are before it.
    first_number: how many lines or paragraphs are before it in its file, if it is a stretch of one.
    """

    staged: StagedPart
    source: int
    held_out: int | None
    first_token: int
    first_number: int


def scattered_checksums(part: StagedPart, count: Count) -> list[str]:
    """Return the checksums of the files that `scatter_part` has written; of those that are missing, empty texts."""
    paths = [part.path(ending) for ending in _SCATTERED]
    checksums = [checksum(path) if path.exists() else "" for path in paths]
    count(1)
    return checksums


def scatter_part(part: PlacedPart, count: Count, *, assignment: ShardAssignment, dtype: np.dtype) -> list[str]:
    """Return the checksums of a part's files: its samples, sorted by shard and place, its validation text, its table.

    Sorted runs of entries (`_ENTRY`), with the tokens of each in another file; `bounds`, [num_runs, num_shards + 1, 2]
    int64: the entries, and the tokens, before each shard's in a run.
    """
    path = part.staged.path
    with (
        writing(path("validation")) as validation_path,
        writing(path("scattered")) as tokens_path,
        writing(path("entries")) as entries_path,
        writing(path("bounds.npy")) as bounds_path,
    ):
        with (
            validation_path.open("wb") as validation,
            tokens_path.open("wb") as tokens,
            entries_path.open("wb") as entries,
        ):
            bounds = np.zeros((1, assignment.num_shards + 1, 2), np.int64)
            collected = [bounds[:0]]
            for start, run in _runs(_training(part, dtype, validation), part.first_token, assignment.sample_length):
                bounds = bounds[:, -1:] + _write_run(start, run, part.source, assignment, tokens, entries)
                collected.append(bounds)
                count(start + len(run) - part.first_token)
        with bounds_path.open("wb") as file:
            np.save(file, np.concatenate(collected))
    write_documents(path("located.parquet"), [(part.staged.source, _locate(part))])
    return [checksum(path(ending)) for ending in _SCATTERED]


def _training(part: PlacedPart, dtype: np.dtype, validation: IO[bytes]) -> Iterator[NDArray[np.integer]]:
    """Yield the training tokens of a part, in blocks, and write its validation tokens to `validation`."""
    for tokens, roles in blocks_with_roles(part.staged, part.held_out, dtype):
        validation.write(tokens[roles == VALIDATION].tobytes())
        yield tokens[roles == TRAIN]


def _runs(
    blocks: Iterator[NDArray[np.integer]], start: int, sample_length: int
) -> Iterator[tuple[int, NDArray[np.integer]]]:
    """Yield runs of tokens with the place of their first ones; all but the last one end with a sample."""
    waiting: list[NDArray[np.integer]] = []
    num_waiting = 0
    for block in blocks:
        waiting.append(block)
        num_waiting += len(block)
        whole = num_waiting - (start + num_waiting) % sample_length
        if num_waiting >= _RUN_TOKENS and whole > 0:
            joined = np.concatenate(waiting)
            yield start, joined[:whole]
            start, waiting, num_waiting = start + whole, [joined[whole:]], num_waiting - whole
    if num_waiting:
        yield start, np.concatenate(waiting)


def _write_run(
    start: int,
    run: NDArray[np.integer],
    source: int,
    assignment: ShardAssignment,
    tokens: IO[bytes],
    entries: IO[bytes],
) -> NDArray[np.int64]:
    """Write the samples of a run, sorted; return its bounds, [1, num_shards + 1, 2], from 0."""
    length = assignment.sample_length
    samples = np.arange(start // length, -(-(start + len(run)) // length), dtype=np.int64)
    # The last tokens of a source may be too few for a sample.
    samples = samples[samples < assignment.streams[source].num_samples]
    begins = np.maximum(samples * length, start)
    sizes = np.minimum((samples + 1) * length, start + len(run)) - begins
    shards, places = assignment.place(assignment.starts[source] + samples)
    order = np.lexsort((places, shards))
    rows = np.empty(len(samples), _ENTRY)
    rows["place"], rows["offset"], rows["length"] = places[order], (begins % length)[order], sizes[order]
    entries.write(rows.tobytes())
    _write_sorted(run, begins - start, sizes, order, length, tokens)
    firsts = np.searchsorted(shards[order], np.arange(assignment.num_shards + 1))
    before = np.concatenate([[0], np.cumsum(sizes[order])])[firsts]
    return np.stack([firsts, before], axis=-1)[None]


def _write_sorted(
    run: NDArray[np.integer],
    begins: NDArray[np.int64],
    sizes: NDArray[np.int64],
    order: NDArray[np.int64],
    length: int,
    file: IO[bytes],
) -> None:
    """Write the stretches of `run` that begin at `begins`, in this order; only the first and the last may be short."""
    is_whole = sizes == length
    whole = np.flatnonzero(is_whole)
    first = int(whole[0]) if len(whole) else 0
    body = run[int(begins[first]) :][: len(whole) * length].reshape(-1, length) if len(whole) else run[:0]
    done = 0
    for place in [*np.flatnonzero(~is_whole[order]).tolist(), len(order)]:
        if place > done:
            file.write(body[order[done:place] - first].data)
        if place < len(order):
            begin = int(begins[order[place]])
            file.write(run[begin : begin + int(sizes[order[place]])].tobytes())
        done = place + 1


def _locate(part: PlacedPart) -> Iterator[Rows]:
    """Yield where the training documents of a part come from, in order, in chunks of bounded size."""
    files, start = part.staged.files(), part.first_token
    for rows, roles in documents_with_roles(part.staged, part.held_out):
        chosen = rows[roles == TRAIN]
        ends = start + np.cumsum(chosen["num_tokens"], dtype=np.int64)
        names = [files[number] for number in chosen["file"].tolist()]
        yield Rows(names, part.first_number + chosen["number"], ends - chosen["num_tokens"])
        start = int(ends[-1]) if len(ends) else start


def samples_path(staging: Path, shard: int) -> Path:
    """Return the path of the table of a shard's samples."""
    return staging / f"_samples.{shard:05d}.parquet"


def assemble_shard(
    shard: int,
    count: Count,
    *,
    parts: Sequence[StagedPart],
    assignment: ShardAssignment,
    dtype: np.dtype,
    folder: Path,
) -> dict[str, Any]:
    """Return the manifest entry of a shard, after writing its `.bin` and `.idx` files and the table of its samples."""
    prefix = f"shard-{shard:04d}"
    length, num_samples = assignment.sample_length, assignment.num_samples(shard)
    sample_bytes = length * dtype.itemsize
    window_bytes = min(max(num_samples * sample_bytes // 8, _WINDOW_BYTES), _LARGEST_WINDOW_BYTES)
    step = max(1, window_bytes // sample_bytes)
    slices = [found for part in parts for found in _slices(part, shard)]
    digest = hashlib.blake2b(digest_size=16)
    with writing(folder / f"{prefix}.bin") as temporary, temporary.open("wb") as file:
        for first in range(0, num_samples, step):
            window = np.zeros((min(step, num_samples - first), length), dtype)
            for each in slices:
                each.fill(window, first)
            file.write(window.data)
            digest.update(window.data)
            count(first + len(window))
    _write_tables(shard, assignment, dtype, folder)
    checksums = {".bin": digest.hexdigest(), ".idx": checksum(folder / f"{prefix}.idx")}
    return {"num_samples": num_samples, "parts": [{"prefix": prefix, "checksums": checksums}]}


def _write_tables(shard: int, assignment: ShardAssignment, dtype: np.dtype, folder: Path) -> None:
    """Write the index and the table of a shard's samples."""
    stride = assignment.sample_length * dtype.itemsize
    with (
        writing(folder / f"shard-{shard:04d}.idx") as index_path,
        writing(samples_path(folder / "staging", shard)) as table_path,
        write_samples(table_path, assignment.streams) as add,
    ):

        def chunks() -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
            place = 0
            for source, _, lengths in assignment.samples(shard):
                add(shard, place, source, lengths)
                yield lengths, np.arange(place, place + len(lengths), dtype=np.int64) * stride
                place += len(lengths)

        write_index(index_path, dtype, assignment.num_samples(shard), chunks())


@dataclass(frozen=True)
class _Slice:
    """The entries of one run of a part that belong to a shard, and where their tokens begin in the part's file."""

    path: Path
    entries: np.ndarray
    begins: NDArray[np.int64]

    def fill(self, window: NDArray[np.integer], first: int) -> None:
        """Copy the samples at the places from `first` on to `window`, [num_samples, sample_length]."""
        start, stop = np.searchsorted(self.entries["place"], [first, first + len(window)]).tolist()
        if start == stop:
            return
        entries, length, itemsize = self.entries[start:stop], window.shape[1], window.dtype.itemsize
        begin, size = int(self.begins[start]), int(entries["length"].sum())
        tokens = np.fromfile(self.path, window.dtype, size, offset=begin * itemsize)
        rows = entries["place"] - first
        done = at = 0
        for place in [*np.flatnonzero(entries["length"] != length).tolist(), len(entries)]:
            end = at + (place - done) * length
            window[rows[done:place]] = tokens[at:end].reshape(-1, length)
            at, done = end, place + 1
            if place < len(entries):
                offset, size = int(entries["offset"][place]), int(entries["length"][place])
                window[rows[place], offset : offset + size] = tokens[at : at + size]
                at += size


def _slices(part: StagedPart, shard: int) -> Iterator[_Slice]:
    bounds = np.load(part.path("bounds.npy"), mmap_mode="r")
    for (start, begin), (stop, _) in zip(bounds[:, shard].tolist(), bounds[:, shard + 1].tolist(), strict=True):
        if stop > start:
            entries = np.fromfile(part.path("entries"), _ENTRY, stop - start, offset=start * _ENTRY.itemsize)
            begins = begin + np.concatenate([[0], np.cumsum(entries["length"][:-1])])
            yield _Slice(part.path("scattered"), entries, begins)
