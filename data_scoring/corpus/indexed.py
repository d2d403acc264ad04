"""Megatron-Core's indexed dataset format: tokens in a `.bin` file, the position of each sequence in an `.idx` file.

The `.idx` layout is: magic, version, dtype code, sequence count, document count, then int32 lengths, int64 byte
pointers and int64 document boundaries (megatron/core/datasets/indexed_dataset.py). Sequences may be anywhere in the
`.bin`, so a new index over an existing `.bin` makes a shard without copying tokens.
"""

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_OF_CODE = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_CODE_OF_DTYPE = {np.dtype(dtype): code for code, dtype in _DTYPE_OF_CODE.items()}
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

    lengths: [num_sequences] int32, tokens; pointers: [num_sequences] int64, bytes; tokens: [num_tokens] of `dtype`.
    """

    prefix: Path
    lengths: NDArray[np.int32]
    pointers: NDArray[np.int64]
    tokens: NDArray[np.integer]

    def sequence(self, index: int) -> NDArray[np.integer]:
        """Return the tokens of one sequence, [length], without copying."""
        start = int(self.pointers[index]) // self.tokens.itemsize
        return self.tokens[start : start + int(self.lengths[index])]


def open_indexed(prefix: Path) -> IndexedTokens:
    """Return the indexed tokens of `prefix`.bin and `prefix`.idx.

    Raises ValueError, naming the file and the remedy, if either is missing, truncated or of another format.
    """
    index_path, tokens_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (index_path, tokens_path):
        if not path.exists():
            raise ValueError(f"{path}: no such file; a Megatron corpus is a .bin and an .idx file side by side")
    with index_path.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise ValueError(f"{index_path}: not a Megatron index file; write it again with Megatron's preprocess_data.py")
    _, version, code, count, num_documents = _HEADER.unpack(header)
    if version != 1 or code not in _DTYPE_OF_CODE:
        raise ValueError(f"{index_path}: index version {version} with token type {code} is not supported; rewrite it")
    needed = _HEADER.size + 12 * count + 8 * num_documents
    if index_path.stat().st_size < needed:
        raise ValueError(
            f"{index_path}: corrupt: it has {index_path.stat().st_size} bytes, but {count} sequences need {needed}; "
            "restore it or delete the corpus folder and prepare again"
        )
    lengths = _map(index_path, np.dtype("<i4"), _HEADER.size, count)
    pointers = _map(index_path, np.dtype("<i8"), _HEADER.size + 4 * count, count)
    dtype = np.dtype(_DTYPE_OF_CODE[code])
    tokens = _map(tokens_path, dtype, 0, tokens_path.stat().st_size // dtype.itemsize)
    for start in range(0, count, _CHUNK):
        ends = pointers[start : start + _CHUNK] + lengths[start : start + _CHUNK].astype(np.int64) * dtype.itemsize
        if ends.max() > tokens_path.stat().st_size:
            raise ValueError(
                f"{tokens_path}: corrupt: it has {tokens_path.stat().st_size} bytes, but its index points to byte "
                f"{ends.max()}; restore it or delete the corpus folder and prepare again"
            )
    return IndexedTokens(Path(prefix), lengths, pointers, tokens)


def _map(path: Path, dtype: np.dtype, offset: int, count: int) -> NDArray:
    if count == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))
