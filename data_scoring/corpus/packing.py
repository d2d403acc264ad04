"""Packing token streams into shards: drop duplicates, hold out validation documents, assign samples at random."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from data_scoring.base.files import allow_open_files, checksum, writing
from data_scoring.base.progress import Progress
from data_scoring.corpus.documents import Rows
from data_scoring.corpus.indexed import write_index
from data_scoring.corpus.permutation import Permutation, mix_bits
from data_scoring.corpus.tokenise import DOCUMENT, StagedSource

_TRAIN, _VALIDATION, _DUPLICATE = 0, 1, 2
_CHUNK_DIGESTS = 1 << 16
_CHUNK_TOKENS = 1 << 21
_CHUNK_SAMPLES = 1 << 16


@dataclass
class SourceRoles:
    """The roles of a source's documents: numbers of documents, tokens and bytes of text by role."""

    source: StagedSource
    roles_path: Path
    documents: list[int] = field(default_factory=lambda: [0, 0, 0])
    tokens: list[int] = field(default_factory=lambda: [0, 0, 0])
    bytes: list[int] = field(default_factory=lambda: [0, 0, 0])


@dataclass(frozen=True)
class Stream:
    """A source's concatenated training (or validation) tokens, and the samples cut from them."""

    name: str
    num_tokens: int
    sample_length: int

    @property
    def num_samples(self) -> int:
        """Return the number of samples: all full ones, plus the rest if it predicts at least one token."""
        full, rest = divmod(self.num_tokens, self.sample_length)
        return full + (rest >= 2)

    def lengths(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the lengths in tokens of the samples `index`; only the last one may be shorter."""
        return np.minimum(self.sample_length, self.num_tokens - index * self.sample_length)


def assign_roles(sources: list[StagedSource], validation_fraction: float, seed: int) -> list[SourceRoles]:
    """Assign each document to training, validation or duplicates; write the roles to disk and return their counts.

    The first of equal documents is kept. Whether a document is held out depends only on its digest and the seed, not on
    its position. A source of which none would be held out gives the document with the smallest key, unless it has no
    other. Peak memory: 8 bytes per document, plus 9 for each distinct text that occurs more than once.
    Raises ValueError if fewer than two distinct documents remain.
    """
    repeated = _repeated_digests(sources)
    seen = np.zeros(len(repeated), bool)
    limit = np.uint64(min(int(validation_fraction * 2**64), 2**64 - 1))
    salt = mix_bits(np.array([seed], np.uint64))[0]
    results: list[SourceRoles] = []
    smallest: list[tuple[int, int]] = []  # of each source: the smallest key of a kept document, and its number
    for source in sources:
        result = SourceRoles(source, source.documents_path.with_suffix(".roles"))
        first = (2**64, 0)
        with result.roles_path.open("wb") as file:
            start = 0
            for rows in source.documents():
                roles = np.full(len(rows), _TRAIN, np.uint8)
                keys = mix_bits(rows["digest"] ^ salt)
                roles[keys < limit] = _VALIDATION
                roles[_repeats(rows["digest"], repeated, seen)] = _DUPLICATE
                kept = np.flatnonzero(roles != _DUPLICATE)
                if len(kept):
                    best = kept[np.argmin(keys[kept])]
                    first = min(first, (int(keys[best]), start + int(best)))
                start += len(rows)
                file.write(roles.tobytes())
                for role in (_TRAIN, _VALIDATION, _DUPLICATE):
                    result.documents[role] += int((roles == role).sum())
                    result.tokens[role] += int(rows["num_tokens"][roles == role].sum())
                    result.bytes[role] += int(rows["num_bytes"][roles == role].sum())
        results.append(result)
        smallest.append(first)
    if sum(result.documents[_TRAIN] + result.documents[_VALIDATION] for result in results) < 2:
        raise ValueError(
            "corpus.sources: fewer than two distinct documents, but one must be held out for validation; "
            "add text, or for format text set document to paragraph or line"
        )
    for result, (_, document) in zip(results, smallest, strict=True):
        if result.documents[_VALIDATION] == 0 and result.documents[_TRAIN] > 1:
            _hold_out(result, document)
    if not any(result.documents[_VALIDATION] for result in results):
        # Every source has one document.
        number = smallest.index(min(smallest))
        _hold_out(results[number], smallest[number][1])
    return results


def _repeated_digests(sources: list[StagedSource]) -> NDArray[np.uint64]:
    digests = np.empty(sum(source.counts["documents"] for source in sources), np.uint64)
    filled = 0
    for source in sources:
        for rows in source.documents():
            digests[filled : filled + len(rows)] = rows["digest"]
            filled += len(rows)
    digests.sort()
    # The repeated digests are collected at the front of the same array, to need no second one.
    count = 0
    for start in range(0, len(digests), _CHUNK_DIGESTS):
        block = digests[start : start + _CHUNK_DIGESTS + 1].copy()
        found = np.unique(block[1:][block[1:] == block[:-1]])
        if count and len(found) and found[0] == digests[count - 1]:
            found = found[1:]
        digests[count : count + len(found)] = found
        count += len(found)
    return digests[:count].copy()


def _repeats(digests: NDArray[np.uint64], repeated: NDArray[np.uint64], seen: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return which of `digests` occurred before, and mark in `seen` those that occur now."""
    if len(repeated) == 0:
        return np.empty(0, np.int64)
    place = np.minimum(np.searchsorted(repeated, digests), len(repeated) - 1)
    candidates = np.flatnonzero(repeated[place] == digests)
    firsts = candidates[np.unique(place[candidates], return_index=True)[1]]
    firsts = firsts[~seen[place[firsts]]]
    seen[place[firsts]] = True
    return np.setdiff1d(candidates, firsts)


def _hold_out(result: SourceRoles, document: int) -> None:
    [row] = np.fromfile(result.source.documents_path, DOCUMENT, 1, offset=document * DOCUMENT.itemsize)
    with result.roles_path.open("r+b") as file:
        os.pwrite(file.fileno(), bytes([_VALIDATION]), document)
    amounts = (1, int(row["num_tokens"]), int(row["num_bytes"]))
    for counts, amount in zip((result.documents, result.tokens, result.bytes), amounts, strict=True):
        counts[_TRAIN] -= amount
        counts[_VALIDATION] += amount


def locate_training(result: SourceRoles) -> Iterator[Rows]:
    """Yield where the training documents of a source come from, in order, in chunks of bounded size."""
    files, start = result.source.files(), 0
    with result.roles_path.open("rb") as roles_file:
        for chunk in result.source.documents():
            chosen = chunk[np.frombuffer(roles_file.read(len(chunk)), np.uint8) == _TRAIN]
            ends = start + np.cumsum(chosen["num_tokens"], dtype=np.int64)
            names = [files[number] for number in chosen["file"].tolist()]
            yield Rows(names, chosen["number"], ends - chosen["num_tokens"])
            start = int(ends[-1]) if len(ends) else start


def read_stream(result: SourceRoles, role: int, dtype: np.dtype) -> Iterator[NDArray[np.integer]]:
    """Yield the tokens of all documents of `role`, in order, in blocks of bounded size."""
    with result.source.tokens_path.open("rb") as tokens_file, result.roles_path.open("rb") as roles_file:
        for chunk in result.source.documents():
            roles = np.frombuffer(roles_file.read(len(chunk)), np.uint8)
            ends = np.cumsum(chunk["num_tokens"], dtype=np.int64)
            # Whole documents, about _CHUNK_TOKENS tokens at a time.
            cuts = np.unique(np.searchsorted(ends, np.arange(_CHUNK_TOKENS, ends[-1], _CHUNK_TOKENS), side="right"))
            for part in np.split(np.arange(len(chunk)), cuts):
                lengths = chunk["num_tokens"][part]
                block = np.fromfile(tokens_file, dtype, int(lengths.sum()))
                yield block[np.repeat(roles[part] == role, lengths)]


def pack_validation(results: list[SourceRoles], streams: list[Stream], dtype: np.dtype, folder: Path) -> dict[str, Any]:
    """Write the validation samples source by source; return the validation set's manifest entry."""
    with writing(folder / "validation.bin") as temporary, temporary.open("wb") as file:
        for result in results:
            for block in read_stream(result, _VALIDATION, dtype):
                file.write(block.tobytes())
    counts = [stream.num_samples for stream in streams]
    starts = np.cumsum([0] + [stream.num_tokens for stream in streams])

    def chunks() -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        for stream, start in zip(streams, starts, strict=False):
            index = np.arange(stream.num_samples, dtype=np.int64)
            yield stream.lengths(index), (start + index * stream.sample_length) * dtype.itemsize

    with writing(folder / "validation.idx") as temporary:
        write_index(temporary, dtype, sum(counts), chunks())
    sources = [{"name": stream.name, "num_samples": stream.num_samples} for stream in streams]
    return {
        "num_samples": sum(counts),
        "sources": sources,
        "parts": [{"prefix": "validation", "checksums": _checksums(folder / "validation")}],
    }


def pack_shards(
    results: list[SourceRoles],
    streams: list[Stream],
    dtype: np.dtype,
    num_shards: int,
    seed: int,
    folder: Path,
    progress: Progress,
) -> "ShardAssignment":
    """Write the training samples to random places in the shards' `.bin` files, in one pass; return the assignment."""
    assignment = ShardAssignment(streams, num_shards, seed)
    sample_length = streams[0].sample_length
    total = assignment.permutation.size
    allow_open_files(num_shards)
    with ExitStack() as stack:
        files: list[IO[bytes]] = []
        for shard in range(num_shards):
            temporary = stack.enter_context(writing(folder / f"shard-{shard:04d}.bin"))
            files.append(stack.enter_context(temporary.open("wb")))
            os.ftruncate(files[-1].fileno(), assignment.num_samples(shard) * sample_length * dtype.itemsize)
        index = 0
        for result, stream in zip(results, streams, strict=True):
            last = index + stream.num_samples
            for samples in _cut(read_stream(result, _TRAIN, dtype), sample_length, stream.num_samples):
                shards, places = assignment.place(np.arange(index, index + len(samples), dtype=np.int64))
                for shard, place, tokens in zip(shards.tolist(), places.tolist(), samples, strict=True):
                    os.pwrite(files[shard].fileno(), tokens.tobytes(), place * sample_length * dtype.itemsize)
                index += len(samples)
                progress("packing samples", index, total)
            assert index == last, f"{stream.name}: {index} samples packed, {last} expected"
    return assignment


def _cut(
    blocks: Iterator[NDArray[np.integer]], sample_length: int, num_samples: int
) -> Iterator[list[NDArray[np.integer]]]:
    carry: NDArray[np.integer] | None = None
    for block in blocks:
        carry = block if carry is None else np.concatenate([carry, block])
        full = len(carry) // sample_length
        num_samples -= full
        yield list(carry[: full * sample_length].reshape(full, sample_length))
        carry = carry[full * sample_length :]
    if num_samples and carry is not None:
        yield [carry]


class ShardAssignment:
    """The random assignment of samples (numbered across all streams) to places in shards, computed, not stored."""

    def __init__(self, streams: list[Stream], num_shards: int, seed: int, num_held_out: int = 0) -> None:
        self.streams = streams
        self.num_shards = num_shards
        self.num_held_out = num_held_out
        self.starts = np.cumsum([0] + [stream.num_samples for stream in streams])
        self.permutation = Permutation(int(self.starts[-1]), seed)
        if self.permutation.size - num_held_out < num_shards:
            raise ValueError(
                f"corpus.sources: only {self.permutation.size - num_held_out} training samples of "
                f"{streams[0].sample_length - 1} tokens for {num_shards} shards; add text, or lower corpus.seq_length"
            )

    def num_samples(self, shard: int) -> int:
        """Return a shard's number of samples; shards differ by at most one."""
        return -(-(self.permutation.size - self.num_held_out - shard) // self.num_shards)

    def place(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the shards, and the places in them, of the samples `index`."""
        place = self.permutation.forward(index) - self.num_held_out
        return place % self.num_shards, place // self.num_shards

    def samples(self, shard: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
        """Yield (source numbers, sample numbers in the source's stream, lengths) of a shard's places, in order."""
        for start in range(0, self.num_samples(shard), _CHUNK_SAMPLES):
            places = np.arange(start, min(start + _CHUNK_SAMPLES, self.num_samples(shard)), dtype=np.int64)
            yield self.describe(self.num_held_out + places * self.num_shards + shard)

    def held_out(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
        """Yield the same for the held-out samples."""
        for start in range(0, self.num_held_out, _CHUNK_SAMPLES):
            yield self.describe(np.arange(start, min(start + _CHUNK_SAMPLES, self.num_held_out), dtype=np.int64))

    def describe(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return (source numbers, sample numbers in the source's stream, lengths) at permuted `positions`."""
        index = self.permutation.inverse(positions)
        source = np.searchsorted(self.starts, index, side="right") - 1
        within = index - self.starts[source]
        lengths = np.empty(len(index), np.int64)
        for number, stream in enumerate(self.streams):
            lengths[source == number] = stream.lengths(within[source == number])
        return source, within, lengths


def index_shards(assignment: ShardAssignment, dtype: np.dtype, folder: Path) -> list[dict[str, Any]]:
    """Write the shards' `.idx` files; return the shards' manifest entries."""
    stride = assignment.streams[0].sample_length * dtype.itemsize
    entries = []
    for shard in range(assignment.num_shards):

        def chunks(shard: int = shard) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
            place = 0
            for _, _, lengths in assignment.samples(shard):
                yield lengths, np.arange(place, place + len(lengths), dtype=np.int64) * stride
                place += len(lengths)

        prefix = f"shard-{shard:04d}"
        with writing(folder / f"{prefix}.idx") as temporary:
            write_index(temporary, dtype, assignment.num_samples(shard), chunks())
        part = {"prefix": prefix, "checksums": _checksums(folder / prefix)}
        entries.append({"num_samples": assignment.num_samples(shard), "parts": [part]})
    return entries


def _checksums(prefix: Path) -> dict[str, str]:
    return {ending: checksum(Path(f"{prefix}{ending}")) for ending in (".bin", ".idx")}
