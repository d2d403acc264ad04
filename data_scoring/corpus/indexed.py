"""Megatron-Core's indexed dataset format: tokens in a `.bin` file, the position of each sequence in an `.idx` file.

The `.idx` layout is: magic, version, dtype code, sequence count, document count, then int32 lengths, int64 byte
pointers and int64 document boundaries (megatron/core/datasets/indexed_dataset.py). Sequences may be anywhere in the
`.bin`, so a new index over an existing `.bin` makes a shard without copying tokens.
"""

import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_OF_CODE = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_CODE_OF_DTYPE = {np.dtype(dtype): code for code, dtype in _DTYPE_OF_CODE.items()}
_FLOATS = {6: " (float64)", 7: " (float32)"}
_RESTORE = "restore it, or write both files again (those of a run: delete the corpus folder and prepare again)"
_CHUNK = 1 << 20


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest token dtype that Megatron reads for a vocabulary: uint16 or int32."""
    return np.dtype(np.uint16 if vocab_size < 65_500 else np.int32)


def write_index(
    path: Path, dtype: np.dtype, count: int, chunks: Iterable[tuple[NDArray[np.int64], NDArray[np.int64]]]
) -> None:
    """Write an `.idx` file of `count` one-sequence documents; memory does not depend on `count`.

    `chunks` yields (lengths in tokens, byte pointers into the `.bin`), both int64, in sequence order.
    """
    pointers_at = _HEADER.size + 4 * count
    documents_at = pointers_at + 8 * count
    with path.open("wb") as file:
        file.write(_HEADER.pack(_MAGIC, 1, _CODE_OF_DTYPE[np.dtype(dtype)], count, count + 1))
        done = 0
        for lengths, pointers in chunks:
            os.pwrite(file.fileno(), lengths.astype("<i4").tobytes(), _HEADER.size + 4 * done)
            os.pwrite(file.fileno(), pointers.astype("<i8").tobytes(), pointers_at + 8 * done)
            done += len(lengths)
        assert done == count, f"{path}: {done} sequences written, {count} expected"
        for start in range(0, count + 1, _CHUNK):
            documents = np.arange(start, min(start + _CHUNK, count + 1), dtype="<i8")
            os.pwrite(file.fileno(), documents.tobytes(), documents_at + 8 * start)


@dataclass(frozen=True)
class IndexedTokens:
    """A `.bin/.idx` pair opened read-only through memory maps.

    dtype: that of the tokens; lengths: [num_sequences] int32, tokens; pointers: [num_sequences] int64, bytes;
    documents: [num_documents + 1] int64, the first sequence of each document, then num_sequences; data: the `.bin`'s
    bytes, [num_bytes] uint8.
    """

    prefix: Path
    dtype: np.dtype
    lengths: NDArray[np.int32]
    pointers: NDArray[np.int64]
    documents: NDArray[np.int64]
    data: NDArray[np.uint8]

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens of all sequences."""
        return int(self.lengths.sum(dtype=np.int64))

    def sequence(self, index: int) -> NDArray[np.integer]:
        """Return the tokens of one sequence, [length], without copying."""
        return self.read(int(self.pointers[index]), int(self.lengths[index]))

    def read(self, pointer: int, count: int) -> NDArray[np.integer]:
        """Return the `count` tokens that start at byte `pointer` of the `.bin`, without copying."""
        # Pointers need not be multiples of the item size.
        return np.frombuffer(self.data, self.dtype, count, pointer) if count else np.empty(0, self.dtype)

    def first_documents(self, count: int) -> "IndexedTokens":
        """Return the same tokens with an index of the first `count` documents."""
        documents = self.documents[: count + 1]
        num_sequences = int(documents[-1])
        return replace(
            self, lengths=self.lengths[:num_sequences], pointers=self.pointers[:num_sequences], documents=documents
        )

    def stretches(self) -> Iterator[tuple[int, int]]:
        """Yield (byte pointer, number of tokens) of each stretch of sequences that are contiguous in the `.bin`.

        Stretches come in the index's order, are as long as possible and not empty.
        """
        pointer, count = 0, 0
        for start in range(0, len(self.lengths), _CHUNK):
            lengths = self.lengths[start : start + _CHUNK].astype(np.int64)
            pointers = self.pointers[start : start + _CHUNK][lengths > 0]
            lengths = lengths[lengths > 0]
            if not len(lengths):
                continue
            ends = pointers + lengths * self.dtype.itemsize
            firsts = np.concatenate([[0], np.flatnonzero(pointers[1:] != ends[:-1]) + 1])
            totals = np.add.reduceat(lengths, firsts)
            for first, total in zip(pointers[firsts].tolist(), totals.tolist(), strict=True):
                if count and first == pointer + count * self.dtype.itemsize:
                    count += total
                    continue
                if count:
                    yield pointer, count
                pointer, count = first, total
        if count:
            yield pointer, count

    def blocks(self) -> Iterator[NDArray[np.integer]]:
        """Yield the tokens of all sequences, in the index's order, in blocks of bounded size."""
        waiting: list[NDArray[np.integer]] = []
        num_waiting = 0
        for pointer, count in self.stretches():
            for start in range(0, count, _CHUNK):
                waiting.append(self.read(pointer + start * self.dtype.itemsize, min(_CHUNK, count - start)))
                num_waiting += len(waiting[-1])
                if num_waiting >= _CHUNK:
                    yield np.concatenate(waiting)
                    waiting, num_waiting = [], 0
        if waiting:
            yield np.concatenate(waiting)


def open_indexed(prefix: Path) -> IndexedTokens:
    """Return the indexed tokens of `prefix`.bin and `prefix`.idx.

    Raises ValueError, naming the file and the remedy, if either is missing, truncated, inconsistent or of another
    format.
    """
    index_path, tokens_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (index_path, tokens_path):
        if path.is_symlink() and not path.exists():
            raise ValueError(f"{path}: links to {path.resolve()}, which is missing; {_RESTORE}")
        if not path.is_file():
            raise ValueError(f"{path}: no such file; a Megatron corpus is a .bin and an .idx file side by side")
    dtype, count, num_documents = _read_header(index_path)
    # Each memory map holds a file descriptor: one for each file.
    index, data = _map(index_path), _map(tokens_path)
    lengths = np.frombuffer(index, "<i4", count, _HEADER.size)
    pointers = np.frombuffer(index, "<i8", count, _HEADER.size + 4 * count)
    documents = np.frombuffer(index, "<i8", num_documents, _HEADER.size + 12 * count)
    indexed = IndexedTokens(Path(prefix), dtype, lengths, pointers, documents, data)
    _check_sequences(indexed, index_path, tokens_path)
    _check_documents(documents, count, index_path)
    return indexed


def _read_header(path: Path) -> tuple[np.dtype, int, int]:
    """Return token dtype, number of sequences and number of document boundaries of an `.idx` file."""
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise ValueError(f"{path}: not a Megatron index file; write it again with Megatron's preprocess_data.py")
    _, version, code, count, num_documents = _HEADER.unpack(header)
    if version != 1 or code not in _DTYPE_OF_CODE:
        raise ValueError(
            f"{path}: index version {version} with token type {code}{_FLOATS.get(code, '')} is not supported; write it "
            "again with Megatron's preprocess_data.py"
        )
    needed = _HEADER.size + 12 * count + 8 * max(num_documents, 1)
    if path.stat().st_size < needed:
        raise ValueError(
            f"{path}: corrupt: it has {path.stat().st_size} bytes, but {count} sequences need {needed}; {_RESTORE}"
        )
    return np.dtype(_DTYPE_OF_CODE[code]), count, num_documents


def _check_sequences(indexed: IndexedTokens, index_path: Path, tokens_path: Path) -> None:
    """Raise ValueError unless all sequences lie inside the `.bin`."""
    itemsize, size = indexed.dtype.itemsize, len(indexed.data)
    for start in range(0, len(indexed.lengths), _CHUNK):
        lengths = indexed.lengths[start : start + _CHUNK].astype(np.int64) * itemsize
        pointers = indexed.pointers[start : start + _CHUNK]
        is_negative = (lengths < 0) | (pointers < 0)
        if is_negative.any():
            row = int(np.argmax(is_negative))
            raise ValueError(
                f"{index_path}: corrupt: sequence {start + row} has length {lengths[row] // itemsize} and pointer "
                f"{pointers[row]}; {_RESTORE}"
            )
        # The sum of pointer and length could overflow.
        is_outside = pointers > size - lengths
        if is_outside.any():
            end = max(map(int.__add__, pointers[is_outside].tolist(), lengths[is_outside].tolist()))
            raise ValueError(
                f"{tokens_path}: corrupt: it has {size} bytes, but its index points to byte {end}; {_RESTORE}"
            )


def _check_documents(documents: NDArray[np.int64], count: int, path: Path) -> None:
    """Raise ValueError unless the document boundaries run from 0 to `count` in order."""
    is_right = len(documents) > 0 and bool(documents[0] == 0 and documents[-1] == count)
    for start in range(0, len(documents) - 1, _CHUNK):
        is_right = is_right and bool((np.diff(documents[start : start + _CHUNK + 1]) >= 0).all())
    if not is_right:
        raise ValueError(
            f"{path}: corrupt: its document boundaries do not run from 0 to its {count} sequences; {_RESTORE}"
        )


def _map(path: Path) -> NDArray[np.uint8]:
    return np.memmap(path, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
