"""Near duplicates: samples that share most of their token n-grams with an earlier sample, found by MinHash.

Three kinds of tasks exchange files. One for each stretch of samples signs them, and divides what is to be compared into
buckets: by band, and by the band's hash. One for each bucket finds the pairs of samples that are equal in the band. One
for each stretch compares the signatures of its samples with those that they are paired with.
"""

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from rensa import RMinHash

from data_scoring.base.engine import Count, Engine, finish, reporting
from data_scoring.base.files import writing
from data_scoring.base.parquet import is_intact, open_writer, read_parquet, write_parquet
from data_scoring.base.progress import Progress, silent
from data_scoring.base.sql import bounded_worker
from data_scoring.corpus.corpus import Corpus
from data_scoring.corpus.permutation import mix_bits
from data_scoring.refine.partitioned_rows import read_partition, write_partitions

# The folder of temporary files, next to the result.
SCRATCH = ".near-duplicates"
# Length of the n-grams, in tokens.
_RUN = 5
_NUM_HASHES = 128
_CHUNK_TOKENS = 1 << 20
_CHUNK_PAIRS = 1 << 14
_CHUNK_ROWS = 1 << 20
# Stretches are of at least this many tokens; there are about this many of them at most.
_LEAST_TOKENS = 1 << 22
_MOST_STRETCHES = 1 << 12
# A bucket has about this many rows of 16 bytes at most.
_BUCKET_ROWS = 1 << 25
# From here on, signing takes more than a minute.
_LONG_TOKENS = 1 << 28
_ROW_GROUP = 1 << 20
# Odd and large, so that products spread over all 64 bits.
_MULTIPLIER = 0x9E3779B97F4A7C15
_SCHEMA = pa.schema([("shard", pa.int32()), ("sample", pa.int32()), ("similarity", pa.float32())])


@dataclass(frozen=True)
class _Search:
    """What the tasks share: the corpus's folder, and that of their files.

    starts: the number in the corpus of each stretch's first sample, and of all samples; shards: the shard of each
    stretch; samples: the number of its first sample there. num_parts: the number of buckets of a band.
    """

    corpus: Path
    folder: Path
    threshold: float
    starts: NDArray[np.int64]
    shards: NDArray[np.int64]
    samples: NDArray[np.int64]
    num_parts: int

    @property
    def num_stretches(self) -> int:
        return len(self.shards)

    @property
    def rows_per_band(self) -> int:
        return _rows_per_band(self.threshold)

    @property
    def num_buckets(self) -> int:
        return _NUM_HASHES // self.rows_per_band * self.num_parts

    def path(self, kind: str, number: int) -> Path:
        return self.folder / f"{kind}-{number:06d}"


def write_near_duplicates(
    corpus: Corpus, threshold: float, path: Path, memory_gb: float, engine: Engine, progress: Progress
) -> None:
    """Write the near duplicates of earlier samples to `path`, a Parquet file: shard, sample, similarity.

    Two samples are near duplicates if the Jaccard similarity of their sets of 5-grams of tokens, estimated by 128
    MinHashes (Broder 1997), is at least `threshold`; of linked samples, the first in corpus order is not listed.
    Samples shorter than an n-gram have no near duplicates. An existing file of the same corpus is kept.

    Takes about a kilobyte of temporary disk space per sample, beside `path`, which all workers must reach: 512 bytes of
    hashes, 16 bytes for each band of them, and 16 bytes for each pair in a bucket. The memory for pairing is
    `memory_gb`, divided among the workers of a host; beyond that, it spills to the same disk.
    """
    if is_intact(path, corpus.fingerprint):
        return
    search = _plan(corpus, threshold, path.parent / SCRATCH)
    # Left by a killed process.
    shutil.rmtree(search.folder, ignore_errors=True)
    search.folder.mkdir(parents=True)
    stretches, buckets, total = range(search.num_stretches), range(search.num_buckets), int(search.starts[-1])
    is_long = total * corpus.seq_length >= _LONG_TOKENS
    memory = memory_gb / engine.num_workers(len(buckets), is_long)
    report = reporting(progress, "looking for near duplicates (samples)", total)
    quiet = reporting(silent, "")
    finish(engine.map(partial(_sign_stretch, search), stretches, report, is_long))
    finish(engine.map(partial(_pair_bucket, search, memory), buckets, quiet, is_long))
    finish(engine.map(partial(_compare_stretch, search), stretches, quiet, is_long))
    _merge(search, path, corpus.fingerprint)
    # A task that is done twice may still be writing.
    shutil.rmtree(search.folder, ignore_errors=True)


def _plan(corpus: Corpus, threshold: float, folder: Path) -> _Search:
    sizes = [corpus.num_samples(shard) for shard in range(corpus.num_shards)]
    step = max(1, _LEAST_TOKENS // corpus.seq_length, sum(sizes) // _MOST_STRETCHES)
    places = [(shard, start) for shard, size in enumerate(sizes) for start in range(0, size, step)]
    shards, samples = np.array(places, np.int64).reshape(-1, 2).T
    first = np.cumsum([0, *sizes])
    starts = np.append(first[shards] + samples, first[-1])
    return _Search(corpus.folder, folder, threshold, starts, shards, samples, -(-sum(sizes) // _BUCKET_ROWS))


def _sign_stretch(search: _Search, number: int, count: Count) -> None:
    """Write the signatures of a stretch's samples, [n, 128] uint32, and the rows (digest, id) of their bands."""
    corpus, first = Corpus(search.corpus), int(search.starts[number])
    size = int(search.starts[number + 1]) - first
    signatures = np.zeros((size, _NUM_HASHES), np.uint32)
    chunk = max(1, _CHUNK_TOKENS // corpus.seq_length)
    signed = [np.empty(0, np.int64)]
    for start in range(0, size, chunk):
        samples = np.arange(start, min(start + chunk, size))
        rows, digests = _sign(corpus, int(search.shards[number]), int(search.samples[number]) + samples)
        rows -= search.samples[number]
        signatures[rows] = digests
        signed.append(rows)
        count(int(samples[-1]) + 1)
    with writing(search.path("signatures", number)) as temporary:
        signatures.tofile(temporary)
    chosen = np.concatenate(signed)
    bands = _bands(signatures[chosen], first + chosen, search)
    write_partitions(search.path("bands", number), search.num_buckets, bands)


def _sign(corpus: Corpus, shard: int, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
    """Return those of `samples` that have at least one n-gram, [n] int64, and their MinHashes, [n, 128] uint32."""
    batch = corpus.read(np.full(len(samples), shard), samples)
    windows = np.lib.stride_tricks.sliding_window_view(batch.tokens.astype(np.uint64), _RUN, axis=1)
    hashes = _hash(windows)
    num_runs = np.maximum(0, batch.num_tokens + 2 - _RUN)
    whole = num_runs > 0
    is_run = np.arange(hashes.shape[1]) < num_runs[:, None]
    offsets = np.concatenate([[0], np.cumsum(num_runs[whole])])
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes[is_run].tolist(), offsets.tolist(), _NUM_HASHES, 42)
    return samples[whole], np.array(matrix.to_rows(), np.uint32).reshape(-1, _NUM_HASHES)


def _hash(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the hashes of the sequences along the last axis."""
    powers = np.array([pow(_MULTIPLIER, power, 2**64) for power in range(1, values.shape[-1] + 1)], np.uint64)
    return np.asarray((values * powers).sum(axis=-1, dtype=np.uint64))


def _rows_per_band(threshold: float) -> int:
    """Return the number of hashes per band: the largest that finds at least 99 % of the pairs at `threshold`."""
    found = [rows for rows in range(1, _NUM_HASHES) if 1 - (1 - threshold**rows) ** (_NUM_HASHES // rows) >= 0.99]
    return max(found, default=1)


def _bands(
    signatures: NDArray[np.uint32], ids: NDArray[np.int64], search: _Search
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield, band by band, the buckets and the rows (digest, id) of signatures."""
    size, num_parts = search.rows_per_band, search.num_parts
    for band in range(_NUM_HASHES // size):
        part = np.ascontiguousarray(signatures[:, band * size : (band + 1) * size])
        # Bands are compared by their hash; collisions are removed later, when signatures are compared.
        digests = _hash(part.astype(np.uint64))
        buckets = band * num_parts + (mix_bits(digests) % np.uint64(num_parts)).astype(np.int64)
        order = np.argsort(buckets, kind="stable")
        yield buckets[order], np.stack([digests.view(np.int64), ids], axis=1)[order]


def _pair_bucket(search: _Search, memory_gb: float, number: int, count: Count) -> None:
    """Write the distinct pairs (id, earlier id) of samples that are equal in the band, by the stretch of the first."""
    with bounded_worker(search.folder, memory_gb) as connection:
        connection.execute("create table bands (digest bigint, id bigint)")
        connection.execute("create table pairs (id bigint, other bigint)")
        for rows in _gathered(search, "bands", number, search.num_stretches, search.num_buckets):
            _insert(connection, "bands", rows)
        for rows in _pairs(_sorted(connection, "bands", ("digest", "id"))):
            _insert(connection, "pairs", rows)
        chunks = (
            (np.searchsorted(search.starts, rows[:, 0], side="right") - 1, rows)
            for rows in _sorted(connection, "pairs", ("id", "other"))
        )
        write_partitions(search.path("pairs", number), search.num_stretches, chunks)


def _insert(connection: duckdb.DuckDBPyConnection, table: str, rows: NDArray[np.int64]) -> None:
    connection.register("found", pa.table({"0": rows[:, 0], "1": rows[:, 1]}))
    connection.execute(f"insert into {table} from found")
    connection.unregister("found")


def _sorted(connection: duckdb.DuckDBPyConnection, table: str, columns: tuple[str, str]) -> Iterator[NDArray[np.int64]]:
    """Yield the rows of a table in the order of its two columns, [n, 2] int64, in chunks of bounded size."""
    # With a cursor of its own, other tables can be written to meanwhile.
    with connection.cursor() as cursor:
        for batch in cursor.sql(f"from {table} order by {', '.join(columns)}").to_arrow_reader(_CHUNK_ROWS):
            yield np.stack([batch[name].to_numpy() for name in columns], axis=1)


def _pairs(chunks: Iterable[NDArray[np.int64]]) -> Iterator[NDArray[np.int64]]:
    """Yield the distinct pairs (id, earlier id) of rows (digest, id), which come in order.

    Of the ids with the same digest, each is paired with the first one and with the one before it. Memory does not
    depend on how many these are.
    """
    rest, first = np.empty((0, 2), np.int64), 0
    for chunk in chunks:
        rows = np.concatenate([rest, chunk])
        is_first = np.ones(len(rows), bool)
        is_first[1:] = rows[1:, 0] != rows[:-1, 0]
        places = np.maximum.accumulate(np.where(is_first, np.arange(len(rows)), 0))
        firsts = rows[places, 1]
        if len(rest):
            firsts[places == 0] = first
        later = np.flatnonzero(~is_first)
        pairs = np.stack([rows[later, 1], rows[later - 1, 1], firsts[later]], axis=1)
        yield pairs[:, :2]
        yield pairs[pairs[:, 1] != pairs[:, 2]][:, ::2]
        rest, first = rows[-1:], int(firsts[-1])


def _gathered(
    search: _Search, kind: str, number: int, num_files: int, num_partitions: int
) -> Iterator[NDArray[np.int64]]:
    """Yield the rows of partition `number` of all files of a kind, [n, 2] int64, in chunks of bounded size."""
    waiting: list[NDArray[np.int64]] = []
    for file in range(num_files):
        waiting.append(read_partition(search.path(kind, file), num_partitions, number))
        if sum(map(len, waiting)) >= _CHUNK_ROWS:
            yield np.concatenate(waiting)
            waiting = []
    if waiting:
        yield np.concatenate(waiting)


def _compare_stretch(search: _Search, number: int, count: Count) -> None:
    """Write the near duplicates in a stretch, each with the similarity to its most similar link."""
    pairs = np.empty((0, 2), np.int64)
    for rows in _gathered(search, "pairs", number, search.num_buckets, search.num_stretches):
        pairs = np.unique(np.concatenate([pairs, rows]), axis=0)
    # Together, those that are compared with the same stretch.
    pairs = pairs[np.argsort(pairs[:, 1], kind="stable")]
    first, mine = int(search.starts[number]), _open_signatures(search, number)
    similarities = np.empty(len(pairs))
    for stretch in np.unique(np.searchsorted(search.starts, pairs[:, 1], side="right") - 1).tolist():
        theirs, offset = _open_signatures(search, stretch), int(search.starts[stretch])
        start, stop = np.searchsorted(pairs[:, 1], search.starts[stretch : stretch + 2]).tolist()
        for begin in range(start, stop, _CHUNK_PAIRS):
            part = slice(begin, min(begin + _CHUNK_PAIRS, stop))
            ids, others = pairs[part].T
            similarities[part] = (theirs[others - offset] == mine[ids - first]).mean(axis=1)
    near = similarities >= search.threshold
    # Every pair links to an earlier sample, so all but the first of a set appear as the later one of a pair.
    ids, similarities = pairs[near, 0], similarities[near]
    order = np.lexsort((-similarities, ids))
    listed, places = np.unique(ids[order], return_index=True)
    columns = [
        np.full(len(listed), search.shards[number], np.int32),
        (listed - first + search.samples[number]).astype(np.int32),
        similarities[order][places].astype(np.float32),
    ]
    write_parquet(search.path("found", number), pa.table(columns, schema=_SCHEMA), "")


def _open_signatures(search: _Search, number: int) -> NDArray[np.uint32]:
    size = int(search.starts[number + 1] - search.starts[number])
    return np.memmap(search.path("signatures", number), np.uint32, "r", shape=(size, _NUM_HASHES))


def _merge(search: _Search, path: Path, fingerprint: str) -> None:
    """Write the near duplicates of all stretches to `path`, in their order."""
    with open_writer(path, _SCHEMA, fingerprint) as writer:
        waiting = _SCHEMA.empty_table()
        for number in range(search.num_stretches):
            waiting = pa.concat_tables([waiting, read_parquet(search.path("found", number))])
            # Some rows stay for the last group: a file without any has one, too.
            while len(waiting) > _ROW_GROUP:
                writer.write_table(waiting[:_ROW_GROUP].combine_chunks(), _ROW_GROUP)
                waiting = waiting[_ROW_GROUP:]
        writer.write_table(waiting.combine_chunks(), _ROW_GROUP)
