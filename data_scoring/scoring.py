"""Scoring: every sample of every shard gets its loss, one Parquet file a shard, committed as it is done."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_scoring.corpus import Corpus
from data_scoring.files import remove_leftovers, writing
from data_scoring.progress import Progress

# Takes shard and sample numbers, [n] each; returns the samples' losses, [n] float32, on the process that keeps them.
ScoreSamples = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32] | None]

FINGERPRINT_KEY = b"reprise.fingerprint"
_LOSSES = pa.schema(
    [
        ("sample", pa.int32()),
        ("num_tokens", pa.int32()),
        ("source", pa.dictionary(pa.int32(), pa.string())),
        ("loss", pa.float32()),
    ]
)


def losses_path(round_folder: Path, shard: int) -> Path:
    """Return the path of a shard's losses."""
    return round_folder / "losses" / f"shard={shard:04d}.parquet"


def parquet_fingerprint(path: Path) -> str | None:
    """Return the fingerprint that a results file carries, or None where there is no such file."""
    if not path.exists():
        return None
    metadata = pq.read_schema(path).metadata or {}
    return str(metadata.get(FINGERPRINT_KEY, b"").decode())


def write_parquet(path: Path, table: pa.Table, fingerprint: str) -> None:
    """Write `table` to `path` atomically, carrying `fingerprint`."""
    metadata = {**(table.schema.metadata or {}), FINGERPRINT_KEY: fingerprint.encode()}
    with writing(path) as temporary:
        pq.write_table(table.replace_schema_metadata(metadata), temporary)


def score_shards(
    corpus: Corpus,
    round_folder: Path,
    fingerprint: str,
    score: ScoreSamples,
    block_size: int,
    is_first: bool,
    progress: Progress,
) -> None:
    """Score the shards that have no losses with this `fingerprint` yet, `block_size` samples at a time.

    Every process calls this; `score` returns the losses on one of them, which writes them. `is_first` marks the
    process that checks the shards' content against their checksums. Raises ValueError for a corrupt shard or a
    loss that is not finite.
    """
    (round_folder / "losses").mkdir(parents=True, exist_ok=True)
    paths = [losses_path(round_folder, shard) for shard in range(corpus.num_shards)]
    if is_first:
        remove_leftovers(round_folder / "losses")
    done = [parquet_fingerprint(path) == fingerprint for path in paths]
    total = sum(corpus.num_samples(shard) for shard in range(corpus.num_shards))
    scored = sum(corpus.num_samples(shard) for shard in range(corpus.num_shards) if done[shard])
    for shard in (shard for shard in range(corpus.num_shards) if not done[shard]):
        if is_first:
            corpus.verify(shard)

        def on_block(done: int, before: int = scored) -> None:
            progress("scoring (samples)", before + done, total)

        losses = score_shard(score, shard, corpus.num_samples(shard), block_size, on_block)
        scored += corpus.num_samples(shard)
        if losses is not None:
            _write_losses(corpus, shard, losses, paths[shard], fingerprint)


def score_shard(
    score: ScoreSamples, shard: int, num_samples: int, block_size: int, on_block: Callable[[int], None]
) -> NDArray[np.float32] | None:
    """Return the losses of a shard's samples, [num_samples] float32, on the process that `score` returns them on.

    Scores `block_size` samples at a time; `on_block` is told there how many are done. Elsewhere returns None.
    """
    parts = []
    for start in range(0, num_samples, block_size):
        samples = np.arange(start, min(start + block_size, num_samples), dtype=np.int64)
        losses = score(np.full(len(samples), shard), samples)
        if losses is not None:
            parts.append(losses)
            on_block(start + len(samples))
    return np.concatenate(parts) if parts else None


def _write_losses(corpus: Corpus, shard: int, losses: NDArray[np.float32], path: Path, fingerprint: str) -> None:
    bad = np.flatnonzero(~np.isfinite(losses))
    if len(bad):
        raise ValueError(
            f"{path}: sample {bad[0]} of shard {shard} has the loss {losses[bad[0]]} ({len(bad)} in all are not "
            "finite); the model has diverged: lower train.lr in a run of another name"
        )
    known = pq.read_table(corpus.samples_path, columns=["num_tokens", "source"], filters=[("shard", "=", shard)])
    samples = pa.array(np.arange(len(losses), dtype=np.int32))
    source = known["source"].combine_chunks().cast(_LOSSES.field("source").type)
    columns = [samples, known["num_tokens"].combine_chunks(), source, pa.array(losses)]
    write_parquet(path, pa.table(columns, schema=_LOSSES), fingerprint)
