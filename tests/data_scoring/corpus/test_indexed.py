"""The index format compared with Megatron's own reader and writer."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from data_scoring.corpus.indexed import open_indexed, token_dtype, write_index


def write(prefix: Path, sequences: list[list[int]], dtype: np.dtype) -> None:
    lengths = np.array([len(sequence) for sequence in sequences])
    pointers = np.concatenate([[0], np.cumsum(lengths)[:-1]]) * dtype.itemsize
    Path(f"{prefix}.bin").write_bytes(np.concatenate(sequences).astype(dtype).tobytes())
    write_index(
        Path(f"{prefix}.idx"), dtype, len(sequences), [(lengths[:2], pointers[:2]), (lengths[2:], pointers[2:])]
    )


@pytest.mark.parametrize("vocab_size", [300, 70_000])
def test_megatron_reads_what_we_write(tmp_path: Path, vocab_size: int) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    sequences = [[1, 2, 3], [vocab_size - 1], [5, 6], [7, 8, 9, 10]]
    write(tmp_path / "ours", sequences, token_dtype(vocab_size))
    theirs = IndexedDataset(str(tmp_path / "ours"))
    assert [theirs[index].tolist() for index in range(4)] == sequences


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64])
def test_we_read_what_megatron_writes(tmp_path: Path, dtype: type) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    documents = [[[1, 2, 3]], [[99], [5, 6]], [], [[]], [[7]]]
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in documents:
        for sequence in document:
            builder.add_item(torch.tensor(sequence, dtype=torch.int64))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    ours = open_indexed(tmp_path / "theirs")
    assert ours.dtype == dtype
    sequences = [sequence for document in documents for sequence in document]
    assert [ours.sequence(index).tolist() for index in range(len(ours.lengths))] == sequences
    assert list(ours.stretches()) == [(0, 7)]
    for count in range(7):
        first = ours.first_documents(count)
        expected = [sequence for document in documents[:count] for sequence in document]
        assert [first.sequence(index).tolist() for index in range(len(first.lengths))] == expected


def replace(path: Path, at: int, content: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + len(content)] = content
    path.write_bytes(data)


# Three sequences of 2, 1 and 1 tokens: the header has 34 bytes, then 3 lengths, 3 pointers and 4 document boundaries.
LENGTHS, POINTERS, DOCUMENTS = 34, 34 + 3 * 4, 34 + 3 * 12


@pytest.mark.parametrize(
    ("ending", "at", "content", "message"),
    [
        (".idx", 0, b"X", r"shard\.idx: not a Megatron index file; write it again"),
        (".idx", 9, struct.pack("<Q", 2), r"shard\.idx: index version 2 with token type 8 is not supported"),
        (".idx", 17, b"\x07", r"shard\.idx: index version 1 with token type 7 \(float32\) is not supported"),
        (".idx", 17, b"\x06", r"shard\.idx: index version 1 with token type 6 \(float64\) is not supported"),
        (".idx", 17, b"\x63", r"shard\.idx: index version 1 with token type 99 is not supported"),
        (".idx", 18, struct.pack("<Q", 4), r"shard\.idx: corrupt: it has 102 bytes, but 4 sequences need 114"),
        (".idx", 18, struct.pack("<Q", 2), r"shard\.idx: corrupt|shard\.bin: corrupt"),
        (".idx", 18, struct.pack("<Q", 2**61), r"shard\.idx: corrupt: it has 102 bytes, but 2305843009213693952"),
        (".idx", 26, struct.pack("<Q", 0), r"shard\.idx: corrupt: its document boundaries do not run from 0 to its 3"),
        (".idx", 26, struct.pack("<Q", 3), r"shard\.idx: corrupt: its document boundaries do not run from 0 to its 3"),
        (".idx", LENGTHS + 4, struct.pack("<i", -1), r"shard\.idx: corrupt: sequence 1 has length -1 and pointer 4;"),
        (".idx", POINTERS + 8, struct.pack("<q", -2), r"shard\.idx: corrupt: sequence 1 has length 1 and pointer -2;"),
        (".idx", POINTERS + 8, struct.pack("<q", 8), r"shard\.bin: corrupt: it has 8 bytes, but .* points to byte 10;"),
        (
            ".idx",
            POINTERS,
            struct.pack("<q", 2**63 - 1),
            r"shard\.bin: corrupt: .* points to byte 9223372036854775811;",
        ),
        (".idx", DOCUMENTS + 8, struct.pack("<q", 3), r"shard\.idx: corrupt: its document boundaries do not run"),
        (".idx", DOCUMENTS, struct.pack("<q", 1), r"shard\.idx: corrupt: its document boundaries do not run"),
        (".idx", DOCUMENTS + 24, struct.pack("<q", 2), r"shard\.idx: corrupt: its document boundaries do not run"),
    ],
)
def test_damage_is_named(tmp_path: Path, ending: str, at: int, content: bytes, message: str) -> None:
    write(tmp_path / "shard", [[1, 2], [3], [4]], token_dtype(300))
    replace(tmp_path / f"shard{ending}", at, content)
    with pytest.raises(ValueError, match=message) as error:
        open_indexed(tmp_path / "shard")
    assert "\n" not in str(error.value)


def test_cut_and_missing_files_are_named(tmp_path: Path) -> None:
    prefix = tmp_path / "shard"
    with pytest.raises(ValueError, match=r"shard\.idx: no such file"):
        open_indexed(prefix)
    write(prefix, [[1, 2], [3], [4]], token_dtype(300))
    index, tokens = (Path(f"{prefix}{ending}").read_bytes() for ending in (".idx", ".bin"))
    for size in range(len(index)):
        Path(f"{prefix}.idx").write_bytes(index[:size])
        with pytest.raises(ValueError, match=r"shard\.idx: (corrupt: it has|not a Megatron index)"):
            open_indexed(prefix)
    Path(f"{prefix}.idx").write_bytes(index)
    for size in range(len(tokens)):
        Path(f"{prefix}.bin").write_bytes(tokens[:size])
        with pytest.raises(ValueError, match=rf"shard\.bin: corrupt: it has {size} bytes, but its index points to"):
            open_indexed(prefix)
    Path(f"{prefix}.bin").unlink()
    Path(f"{prefix}.bin").symlink_to(tmp_path / "elsewhere.bin")
    with pytest.raises(ValueError, match=r"shard\.bin: links to .*elsewhere\.bin, which is missing"):
        open_indexed(prefix)
