"""The index format compared with Megatron's own reader and writer."""

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


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_we_read_what_megatron_writes(tmp_path: Path, dtype: type) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    sequences = [[1, 2, 3], [299], [5, 6]]
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for sequence in sequences:
        builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    ours = open_indexed(tmp_path / "theirs")
    assert [ours.sequence(index).tolist() for index in range(3)] == sequences
    assert ours.tokens.dtype == dtype


def test_damage_is_named(tmp_path: Path) -> None:
    prefix = tmp_path / "shard"
    with pytest.raises(ValueError, match=r"shard\.idx: no such file"):
        open_indexed(prefix)
    write(prefix, [[1, 2], [3], [4]], token_dtype(300))
    index, tokens = (Path(f"{prefix}{ending}").read_bytes() for ending in (".idx", ".bin"))
    Path(f"{prefix}.bin").write_bytes(tokens[:-2])
    with pytest.raises(ValueError, match=r"shard\.bin: corrupt: it has 6 bytes, but its index points to byte 8"):
        open_indexed(prefix)
    Path(f"{prefix}.idx").write_bytes(index[:-20])
    with pytest.raises(ValueError, match=r"shard\.idx: corrupt"):
        open_indexed(prefix)
    Path(f"{prefix}.idx").write_bytes(b"not an index" * 10)
    with pytest.raises(ValueError, match=r"shard\.idx: not a Megatron index"):
        open_indexed(prefix)
