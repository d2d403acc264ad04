"""Megatron corpora used in place, compared with what Megatron's own IndexedDataset reads from the same files."""

import json
import os
import struct
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_scoring.base.checksums import FileVerifier
from data_scoring.base.progress import silent
from data_scoring.config import CorpusConfig, TokenizerConfig
from data_scoring.corpus import indexed
from data_scoring.corpus.corpus import VALIDATION, Corpus
from data_scoring.corpus.prepare_corpus import prepare_corpus
from data_scoring.corpus.reading_order import ReadingOrder

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}
Sequences = list[tuple[int, int]]  # (byte pointer, length)


def write_pair(
    prefix: Path,
    dtype: str,
    lengths: Sequence[int],
    arrange: Callable[[Sequences], Sequences] = list,
    documents: Sequence[int] | None = None,
    header: bytes = b"",
    trailer: bytes = b"",
    vocab_size: int = 100,
) -> None:
    """Write random tokens and an index that lists their sequences as `arrange` says, by Megatron's description."""
    itemsize = np.dtype(dtype).itemsize
    tokens = np.random.default_rng(sum(lengths)).integers(0, vocab_size, sum(lengths)).astype(dtype)
    Path(f"{prefix}.bin").write_bytes(header + tokens.tobytes() + trailer)
    starts = [len(header) + start * itemsize for start in [0, *accumulate(lengths)][:-1]]
    sequences = arrange(list(zip(starts, lengths, strict=True)))
    bounds = range(len(sequences) + 1) if documents is None else documents
    Path(f"{prefix}.idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, CODES[dtype], len(sequences), len(bounds))
        + b"".join(struct.pack("<i", length) for _, length in sequences)
        + b"".join(struct.pack("<q", pointer) for pointer, _ in sequences)
        + b"".join(struct.pack("<q", bound) for bound in bounds)
    )


def megatron_stream(prefix: Path, num_sequences: int | None = None) -> list[int]:
    """Return the tokens of the sequences that Megatron reads, one after the other."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    count = len(dataset) if num_sequences is None else num_sequences
    return [token for index in range(count) for token in dataset[index].tolist()]


def prepare(folder: Path, prefixes: list[Path], tokenizer: Path, **source: object) -> Corpus:
    sources = [{"name": f"s{number}", "path": str(prefix), **source} for number, prefix in enumerate(prefixes)]
    config = {"sources": sources, "seq_length": 8, "num_shards": 3, "validation_fraction": 0.2}
    prepare_corpus(CorpusConfig.model_validate(config), TokenizerConfig(path=str(tokenizer)), 5, folder, "f", silent)
    return Corpus(folder)


def assert_windows(corpus: Corpus, streams: list[list[int]]) -> None:
    """Assert that the samples are the windows of `streams`, each once, and that they are read in order."""
    expected = sorted(
        (f"s{number}", stream[start : start + 9])
        for number, stream in enumerate(streams)
        for start in range(0, len(stream), 9)
        if len(stream) - start > 1
    )
    rows = pq.read_table(corpus.samples_path).to_pylist()
    places = [(row["shard"], row["sample"], row["source"]) for row in rows]
    places += [(VALIDATION, sample, source) for sample, source in enumerate(corpus.validation_sources)]
    batch = corpus.read(np.array([place[0] for place in places]), np.array([place[1] for place in places]))
    found = [
        (source, tokens[: length + 1].tolist())
        for (_, _, source), tokens, length in zip(places, batch.tokens, batch.num_tokens.tolist(), strict=True)
    ]
    assert sorted(found) == expected
    order = ReadingOrder(corpus, 5)
    for number, stream in enumerate(streams):
        assert np.concatenate(list(order.blocks(number))).tolist() == stream
        samples = np.arange((len(stream) + 7) // 9)
        for sample, shard, place in zip(samples.tolist(), *order.locate(number, samples), strict=True):
            if shard >= 0:
                read = corpus.read(np.array([shard]), np.array([place]))
                assert read.tokens[0, : read.num_tokens[0] + 1].tolist() == stream[sample * 9 : sample * 9 + 9]
    assert FileVerifier(corpus.folder / "verified.json").find_damage(corpus.files()) == {}


LENGTHS = [7, 20, 1, 33, 2, 2, 14, 50, 9, 9, 31, 4]
ARRANGEMENTS: dict[str, tuple[Callable[[Sequences], Sequences], bool]] = {
    # With whether the tokens have to be copied.
    "as written": (list, False),
    "second half": (lambda all_: all_[6:], False),
    "first half": (lambda all_: all_[:6], False),
    "inner part": (lambda all_: all_[3:9], False),
    "reversed": (lambda all_: all_[::-1], True),
    "every second": (lambda all_: all_[::2], True),
    "every second, reversed": (lambda all_: all_[::-2], True),
    "a gap": (lambda all_: all_[:4] + all_[5:], True),
    "repeated": (lambda all_: all_ + all_, True),
    "overlapping": (lambda all_: [*all_, (all_[3][0], 40)], True),
    "empty sequences between": (lambda all_: [(0, 0), *all_[:5], (0, 0), *all_[5:], (2, 0)], False),
    "split": (lambda all_: [all_[0], (all_[1][0], 0), *all_[1:]], False),
}


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("header", [b"", b"eight by", b"odd"])
def test_the_index_says_what_is_read(
    tmp_path: Path, tiny_corpus: Corpus, arrangement: str, header: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexed, "_CHUNK", 5)
    arrange, is_copied = ARRANGEMENTS[arrangement]
    for name, dtype in (("a", "uint16"), ("b", "int32")):
        write_pair(tmp_path / name, dtype, LENGTHS, arrange, header=header, trailer=b"end" if header else b"")
    corpus = prepare(tmp_path / "corpus", [tmp_path / "a", tmp_path / "b"], tiny_corpus.tokenizer_path)
    assert_windows(corpus, [megatron_stream(tmp_path / name) for name in "ab"])
    assert [path.name for path in sorted((tmp_path / "corpus").glob("tokens-*"))] == (
        ["tokens-s0.bin", "tokens-s1.bin"] if is_copied else []
    )


@pytest.mark.parametrize("dtype", CODES)
def test_every_token_type_is_read(tmp_path: Path, tiny_corpus: Corpus, dtype: str) -> None:
    write_pair(tmp_path / "a", dtype, LENGTHS, lambda all_: all_[::-1])
    write_pair(tmp_path / "b", dtype, LENGTHS)
    corpus = prepare(tmp_path / "corpus", [tmp_path / "a", tmp_path / "b"], tiny_corpus.tokenizer_path)
    assert_windows(corpus, [megatron_stream(tmp_path / name) for name in "ab"])


@pytest.mark.parametrize(("count", "num_sequences"), [(1, 5), (2, 5), (3, 9), (4, 12), (9, 12)])
def test_max_documents_counts_megatrons_documents(
    tmp_path: Path, tiny_corpus: Corpus, count: int, num_sequences: int
) -> None:
    write_pair(tmp_path / "a", "int32", LENGTHS, documents=[0, 5, 5, 9, 12])
    corpus = prepare(tmp_path / "corpus", [tmp_path / "a"], tiny_corpus.tokenizer_path, max_documents=count)
    assert_windows(corpus, [megatron_stream(tmp_path / "a", num_sequences)])


def test_a_shard_of_another_corpus_is_a_source(tmp_path: Path, tiny_corpus: Corpus) -> None:
    write_pair(tmp_path / "a", "uint16", [40] * 30)
    first = prepare(tmp_path / "first", [tmp_path / "a"], tiny_corpus.tokenizer_path)
    # A shard of a corpus used in place lists windows all over the file; one made from text may have a short sample.
    shards = [tmp_path / "first" / "shard-0001-s0", tiny_corpus.folder / "shard-0000"]
    second = prepare(tmp_path / "second", shards, tiny_corpus.tokenizer_path)
    streams = []
    for source, shard in ((first, 1), (tiny_corpus, 0)):
        batch = source.read(np.full(source.num_samples(shard), shard), np.arange(source.num_samples(shard)))
        rows = zip(batch.tokens, batch.num_tokens.tolist(), strict=True)
        streams.append([token for tokens, length in rows for token in tokens[: length + 1].tolist()])
    assert streams == [megatron_stream(prefix) for prefix in shards]
    assert_windows(second, streams)


@pytest.mark.parametrize("arrange", [list, lambda all_: all_[::-1]], ids=["in place", "copied"])
@pytest.mark.parametrize(("dtype", "token"), [("uint16", 300), ("int32", -1), ("int64", 2**40)])
@pytest.mark.parametrize("at", [0, 1_200_000, 2_399_999])
def test_tokens_outside_the_vocabulary_are_found_everywhere(
    tmp_path: Path, tiny_corpus: Corpus, arrange: Callable[[Sequences], Sequences], dtype: str, token: int, at: int
) -> None:
    write_pair(tmp_path / "a", dtype, [1000] * 2400, arrange)
    tokens = np.memmap(tmp_path / "a.bin", dtype, "r+")
    tokens[at] = token
    tokens.flush()
    with pytest.raises(
        ValueError, match=rf"a\.bin: source s0 has token {token}, but tokenizer.path has only 300 tokens"
    ):
        prepare(tmp_path / "corpus", [tmp_path / "a"], tiny_corpus.tokenizer_path)


def test_tokens_that_the_index_does_not_list_do_not_matter(tmp_path: Path, tiny_corpus: Corpus) -> None:
    write_pair(tmp_path / "a", "uint16", LENGTHS, lambda all_: all_[1:], header=b"\xff\xff", trailer=b"\xff\xff")
    assert_windows(
        prepare(tmp_path / "corpus", [tmp_path / "a"], tiny_corpus.tokenizer_path), [megatron_stream(tmp_path / "a")]
    )


def test_an_index_without_tokens_is_refused(tmp_path: Path, tiny_corpus: Corpus) -> None:
    write_pair(tmp_path / "a", "uint16", [0, 0])
    with pytest.raises(ValueError, match=r"corpus.sources.s0.path: .*a.idx lists no tokens"):
        prepare(tmp_path / "corpus", [tmp_path / "a"], tiny_corpus.tokenizer_path)


@pytest.mark.parametrize("arrange", [list, lambda all_: all_[::-1]], ids=["in place", "copied"])
def test_a_change_of_the_tokens_is_noticed(
    tmp_path: Path, tiny_corpus: Corpus, arrange: Callable[[Sequences], Sequences]
) -> None:
    write_pair(tmp_path / "a", "uint16", LENGTHS, arrange, header=b"head")
    corpus = prepare(tmp_path / "corpus", [tmp_path / "a"], tiny_corpus.tokenizer_path)
    link = tmp_path / "corpus" / "validation-s0.bin"
    path = link.resolve()
    before = path.read_bytes()

    def damage() -> dict[Path, str]:
        return FileVerifier(tmp_path / "verified.json").find_damage(Corpus(corpus.folder).files())

    # Another time alone is no change.
    os.utime(path, ns=(1, 1))
    assert damage() == {}
    path.write_bytes(before[:50] + bytes([before[50] ^ 1]) + before[51:])
    assert damage() == {link: "its checksum differs"}
    path.write_bytes(before[:-2])
    assert damage() == {link: "its checksum differs"}
    path.unlink()
    assert damage() == {link: "it is missing"}
    with pytest.raises(ValueError, match=rf"validation-s0.bin: links to .*{path.name}, which is missing"):
        Corpus(corpus.folder).parts(VALIDATION)
    path.write_bytes(before)
    assert damage() == {}


def test_a_corpus_of_version_0_8_is_read(tmp_path: Path, tiny_corpus: Corpus) -> None:
    write_pair(tmp_path / "a", "uint16", LENGTHS)
    corpus = prepare(tmp_path / "corpus", [tmp_path / "a"], tiny_corpus.tokenizer_path)
    manifest = {**corpus.manifest, "sources": [{"name": "s0", "train_tokens": sum(LENGTHS)}]}
    del manifest["validation"]["parts"][0]["checksums"][".bin"]
    (corpus.folder / "manifest.json").write_text(json.dumps(manifest))
    assert_windows(Corpus(corpus.folder), [megatron_stream(tmp_path / "a")])
