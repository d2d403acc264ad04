"""Near duplicates against Jaccard similarities that are computed exactly, and a second search in plain Python."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from rensa import RMinHash

from data_scoring.base.engine import Engine
from data_scoring.base.parquet import write_parquet
from data_scoring.base.progress import silent
from data_scoring.config import CorpusConfig, SourceConfig, TokenizerConfig
from data_scoring.corpus.corpus import Corpus
from data_scoring.corpus.prepare_corpus import prepare_corpus
from data_scoring.refine import near_duplicates
from data_scoring.refine.near_duplicates import write_near_duplicates
from tests.conftest import read_rows
from tests.data_scoring.odd_engines import DeadlyEngine, TwiceEngine


def runs(corpus: Corpus, shard: int, sample: int) -> set[tuple[int, ...]]:
    batch = corpus.read(np.array([shard]), np.array([sample]))
    tokens = batch.tokens[0, : batch.num_tokens[0] + 1].tolist()
    return {tuple(tokens[place : place + 5]) for place in range(len(tokens) - 4)}


@pytest.fixture(scope="module")
def repetitive(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A corpus whose text comes again and again, a little changed."""
    return prepare_repetitive(tmp_path_factory.mktemp("repetitive"))


def prepare_repetitive(folder: Path) -> Corpus:
    """Return a corpus in `folder` whose text comes again and again, a little changed."""
    generator = np.random.default_rng(0)
    alphabet = np.array(list("abcdefghijklmnop"))
    first = "".join(generator.choice(alphabet, 64 * 40))
    texts = [first, "".join(generator.choice(alphabet, 64 * 60))]
    for _ in range(3):
        again = list(first)
        for place in generator.integers(0, len(again), 60):
            again[place] = "z"
        texts.append("".join(again))
    # Many that are as similar to the first of them as to the one before.
    short = texts[1][: 64 * 6]
    for _ in range(8):
        again = list(short)
        for place in generator.integers(0, len(again), 10):
            again[place] = "z"
        texts.append("".join(again))
    with (folder / "text.jsonl").open("w") as file:
        for text in texts:
            file.write(json.dumps({"text": text}) + "\n")
    config = CorpusConfig(
        sources=(SourceConfig(name="text", path=str(folder / "text.jsonl")),),
        seq_length=63, num_shards=3, validation_fraction=1e-9,
    )  # fmt: skip
    prepare_corpus(config, TokenizerConfig(vocab_size=257), 0, folder / "corpus", "repetitive", silent)
    return Corpus(folder / "corpus")


def test_what_is_listed_is_similar_to_something_earlier_and_all_of_it_is_listed(
    repetitive: Corpus, tmp_path: Path, engine: Engine
) -> None:
    corpus, path, threshold = repetitive, tmp_path / "near.parquet", 0.6
    write_near_duplicates(corpus, threshold, path, 1.0, engine, silent)
    listed = {row[:2]: row[2] for row in read_rows(path, "shard", "sample", "similarity")}
    places = [(shard, sample) for shard in range(3) for sample in range(corpus.num_samples(shard))]
    sets = [runs(corpus, *place) for place in places]
    num_near = 0
    for number, place in enumerate(places):
        similar = [len(sets[number] & other) / max(1, len(sets[number] | other)) for other in sets[:number]]
        most = max(similar, default=0.0)
        # An estimate by 128 hashes is off by 0.04 or so.
        if most > threshold + 0.15:
            assert listed[place] == pytest.approx(most, abs=0.2)
            num_near += 1
        elif most < threshold - 0.15:
            assert place not in listed
    assert num_near > 10
    written = path.stat().st_mtime_ns
    write_near_duplicates(corpus, threshold, path, 1.0, engine, silent)
    assert path.stat().st_mtime_ns == written
    assert list(tmp_path.iterdir()) == [path]


def search_again(corpus: Corpus, threshold: float, path: Path) -> int:
    """Write what is listed, found without files, bands in buckets and SQL; return the number of samples listed."""
    # The largest bands that find 99 % of the pairs at the threshold.
    size = max(rows for rows in range(1, 128) if 1 - (1 - threshold**rows) ** (128 // rows) >= 0.99)
    places = [(shard, sample) for shard in range(corpus.num_shards) for sample in range(corpus.num_samples(shard))]
    powers = np.array([pow(0x9E3779B97F4A7C15, power, 2**64) for power in range(1, 6)], np.uint64)
    signatures: dict[int, list[int]] = {}
    equal: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, (shard, sample) in enumerate(places):
        batch = corpus.read(np.array([shard]), np.array([sample]))
        tokens = batch.tokens[0, : batch.num_tokens[0] + 1].astype(np.uint64)
        if len(tokens) < 5:
            continue
        hashes = [int((tokens[place : place + 5] * powers).sum()) for place in range(len(tokens) - 4)]
        [row] = RMinHash.digest_matrix_from_flat_token_hashes(hashes, [0, len(hashes)], 128, 42).to_rows()
        signatures[number] = row
        for band in range(128 // size):
            equal[band, *row[band * size : (band + 1) * size]].append(number)
    most: dict[int, float] = {}
    for same in equal.values():
        for place, number in enumerate(same[1:], start=1):
            for other in (same[0], same[place - 1]):
                similarity = np.mean(np.array(signatures[number]) == signatures[other])
                if similarity >= threshold:
                    most[number] = max(similarity, most.get(number, 0.0))
    listed = sorted(most)
    columns = {
        "shard": np.array([places[number][0] for number in listed], np.int32),
        "sample": np.array([places[number][1] for number in listed], np.int32),
        "similarity": np.array([most[number] for number in listed], np.float32),
    }
    write_parquet(path, pa.table(columns), corpus.fingerprint)
    return len(listed)


def cut_finely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the corpus cut into stretches of 20 samples, and each band into several buckets."""
    monkeypatch.setattr(near_duplicates, "_LEAST_TOKENS", 20 * 63)
    monkeypatch.setattr(near_duplicates, "_BUCKET_ROWS", 100)


@pytest.mark.parametrize("threshold", [0.6, 0.8])
def test_the_file_is_that_of_a_second_search_however_the_corpus_is_cut(
    repetitive: Corpus, tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch, threshold: float
) -> None:
    expected = tmp_path / "again.parquet"
    assert search_again(repetitive, threshold, expected) > 10
    write_near_duplicates(repetitive, threshold, tmp_path / "whole.parquet", 1.0, engine, silent)
    cut_finely(monkeypatch)
    search = near_duplicates._plan(repetitive, threshold, tmp_path)
    assert search.num_stretches > 8
    assert search.num_parts > 1
    write_near_duplicates(repetitive, threshold, tmp_path / "cut.parquet", 1.0, engine, silent)
    for name in ("whole", "cut"):
        assert (tmp_path / f"{name}.parquet").read_bytes() == expected.read_bytes()
    assert {each.suffix for each in tmp_path.iterdir()} == {".parquet"}


def test_a_corpus_without_near_duplicates_has_an_empty_list(
    tiny_corpus: Corpus, tmp_path: Path, in_process: Engine
) -> None:
    assert search_again(tiny_corpus, 0.95, tmp_path / "again.parquet") == 0
    write_near_duplicates(tiny_corpus, 0.95, tmp_path / "near.parquet", 1.0, in_process, silent)
    assert (tmp_path / "near.parquet").read_bytes() == (tmp_path / "again.parquet").read_bytes()


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_pairs_are_those_with_the_first_and_with_the_one_before(size: int) -> None:
    rows = np.random.default_rng(1).integers([0, 0], [12, 1], (400, 2))
    # All in one chunk have the same digest, and those in the chunks around it, too.
    rows[100:180, 0] = 20
    rows[:, 1] = np.arange(len(rows))
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    expected: set[tuple[int, int]] = set()
    for digest in set(rows[:, 0].tolist()):
        same = rows[rows[:, 0] == digest, 1].tolist()
        expected |= {(later, same[0]) for later in same[1:]} | {*zip(same[1:], same, strict=False)}
    chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
    found = np.concatenate(list(near_duplicates._pairs(chunks))).tolist()
    assert sorted(map(tuple, found)) == sorted(expected)


@pytest.mark.parametrize("sizes", [(700_000, 500_000, 0, 3), (1 << 20,), (1 << 20, 1 << 20), (0,)])
def test_a_long_list_is_written_like_one_table(sizes: tuple[int, ...], tmp_path: Path) -> None:
    empty = np.zeros(len(sizes), np.int64)
    search = near_duplicates._Search(tmp_path, tmp_path, 0.8, np.append(empty, 0), empty, empty, 1)
    tables = []
    for number, size in enumerate(sizes):
        samples = np.arange(size, dtype=np.int32)
        columns = [np.full(size, number, np.int32), samples, (samples % 128 / 128).astype(np.float32)]
        tables.append(pa.table(columns, schema=near_duplicates._SCHEMA))
        write_parquet(search.path("found", number), tables[-1], "")
    near_duplicates._merge(search, tmp_path / "found.parquet", "f")
    write_parquet(tmp_path / "expected.parquet", pa.concat_tables(tables).combine_chunks(), "f")
    assert (tmp_path / "found.parquet").read_bytes() == (tmp_path / "expected.parquet").read_bytes()


def test_a_rerun_after_a_lost_worker_has_the_same_result_if_all_is_done_twice(
    repetitive: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_finely(monkeypatch)
    expected, path = tmp_path / "again.parquet", tmp_path / "near.parquet"
    search_again(repetitive, 0.6, expected)
    with DeadlyEngine(3, tmp_path / "killed") as engine:
        with pytest.raises(ValueError, match="a process of the pool was killed"):
            write_near_duplicates(repetitive, 0.6, path, 1.0, engine, silent)
        assert (tmp_path / near_duplicates.SCRATCH).exists()
        assert not path.exists()
    with TwiceEngine() as engine:
        write_near_duplicates(repetitive, 0.6, path, 1.0, engine, silent)
    assert path.read_bytes() == expected.read_bytes()
    assert not (tmp_path / near_duplicates.SCRATCH).exists()
