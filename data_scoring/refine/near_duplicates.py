"""Near duplicates: samples that share most of their token n-grams with an earlier sample, found by MinHash."""

import shutil
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from rensa import RMinHash

from data_scoring.base.parquet import is_intact, write_parquet
from data_scoring.base.progress import Progress
from data_scoring.base.sql import bounded
from data_scoring.corpus.corpus import Corpus

# The folder of temporary files, next to the result.
SCRATCH = ".near-duplicates"
# Length of the n-grams, in tokens.
_RUN = 5
_NUM_HASHES = 128
_CHUNK_TOKENS = 1 << 20
_CHUNK_PAIRS = 1 << 14
# Odd and large, so that products spread over all 64 bits.
_MULTIPLIER = 0x9E3779B97F4A7C15


def write_near_duplicates(corpus: Corpus, threshold: float, path: Path, memory_gb: float, progress: Progress) -> None:
    """Write the near duplicates of earlier samples to `path`, a Parquet file: shard, sample, similarity.

    Two samples are near duplicates if the Jaccard similarity of their sets of 5-grams of tokens, estimated by 128
    MinHashes (Broder 1997), is at least `threshold`; of linked samples, the first in corpus order is not listed.
    Samples shorter than an n-gram have no near duplicates. Takes about a kilobyte of temporary disk space per sample
    (128 hashes, and 17 bytes for each band of them), and 16 bytes of memory for each pair that shares a band. An
    existing file of the same corpus is kept.
    """
    if is_intact(path, corpus.fingerprint):
        return
    sizes = [corpus.num_samples(shard) for shard in range(corpus.num_shards)]
    first = np.cumsum([0, *sizes])
    folder = path.parent / SCRATCH
    # Left by a killed process.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with bounded(folder, memory_gb) as connection:
        signatures = np.lib.format.open_memmap(
            folder / "signatures.npy", "w+", np.uint32, (int(first[-1]), _NUM_HASHES)
        )
        rows = _rows_per_band(threshold)
        connection.execute("create table bands (band utinyint, digest ubigint, id bigint)")
        chunk = max(1, _CHUNK_TOKENS // corpus.seq_length)
        for shard, size in enumerate(sizes):
            for start in range(0, size, chunk):
                samples = np.arange(start, min(start + chunk, size))
                ids, digests = _sign(corpus, shard, samples)
                ids += first[shard]
                signatures[ids] = digests
                _add_bands(connection, ids, digests, rows)
                progress(
                    "looking for near duplicates (samples)", int(first[shard]) + int(samples[-1]) + 1, int(first[-1])
                )
        ids, similarities = _linked(connection, signatures, threshold)
    shutil.rmtree(folder)
    shards = np.searchsorted(first, ids, side="right") - 1
    columns = {"shard": shards.astype(np.int32), "sample": (ids - first[shards]).astype(np.int32)}
    write_parquet(path, pa.table({**columns, "similarity": similarities.astype(np.float32)}), corpus.fingerprint)


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


def _add_bands(
    connection: duckdb.DuckDBPyConnection, ids: NDArray[np.int64], digests: NDArray[np.uint32], rows: int
) -> None:
    for band in range(_NUM_HASHES // rows):
        part = np.ascontiguousarray(digests[:, band * rows : (band + 1) * rows])
        # Bands are compared by their hash; collisions are removed later, when signatures are compared.
        digest = _hash(part.astype(np.uint64))
        table = pa.table({"digest": digest, "id": ids})
        connection.register("found", table)
        connection.execute(f"insert into bands select {band}, digest, id from found")
        connection.unregister("found")


def _linked(
    connection: duckdb.DuckDBPyConnection, signatures: NDArray[np.uint32], threshold: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return all but the first of each set of linked samples, and each one's similarity to its most similar link."""
    pairs = connection.sql(
        """select distinct other, id from (
            select id, unnest([min(id) over same, lag(id) over (same order by id)]) as other from bands
            window same as (partition by band, digest)
        ) where other < id order by id, other"""
    ).fetchnumpy()
    others, ids = pairs["other"].astype(np.int64), pairs["id"].astype(np.int64)
    similarities = np.empty(len(ids))
    for start in range(0, len(ids), _CHUNK_PAIRS):
        part = slice(start, start + _CHUNK_PAIRS)
        similarities[part] = (signatures[others[part]] == signatures[ids[part]]).mean(axis=1)
    near = similarities >= threshold
    # Every pair links to an earlier sample, so all but the first of a set appear as the later one of a pair.
    order = np.argsort(-similarities[near], kind="stable")
    listed, place = np.unique(ids[near][order], return_index=True)
    return listed, similarities[near][order][place]
