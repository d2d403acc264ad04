"""Seen losses as scores: each sample's loss when it was last trained on, without a forward pass."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_scoring.base.files import remove_leftovers
from data_scoring.base.parquet import is_intact
from data_scoring.base.sql import parquet_rows
from data_scoring.corpus.corpus import Corpus
from data_scoring.losses.origin import Origin
from data_scoring.losses.shard_scoring import losses_path, write_losses


def list_seen_losses(round_folder: Path) -> list[Path]:
    """Return the files of a round's seen losses, in order."""
    return sorted((round_folder / "seen").glob("step=*.parquet"))


def last_seen(rounds_folder: Path, round_number: int, where: str) -> str:
    """Return the SQL relation (shard, sample, loss) of the last seen losses up to a round.

    `where` is a condition on shard and sample; it is applied before anything is held in memory.
    """
    # The empty relation defines the column types if nothing was recorded.
    parts = ["select 0 as round, 0 as step, 0 as shard, 0 as sample, 0::float as loss where false"]
    for number in range(1, round_number + 1):
        if files := list_seen_losses(rounds_folder / str(number)):
            parts.append(f"select {number} as round, step, shard, sample, loss from {parquet_rows(files)}")
    order = "round::bigint * 4294967296 + step"
    rows = " union all ".join(parts)
    return f"(select shard, sample, arg_max(loss, {order}) as loss from ({rows}) where {where} group by all)"


def write_seen_losses(
    corpus: Corpus,
    round_folder: Path,
    round_number: int,
    fingerprint: str,
    origin: Origin,
    on_shard: Callable[[int], None],
) -> None:
    """Write each shard's losses: for each sample, its last seen loss up to `round_number`.

    Shards with this `fingerprint` are skipped; `on_shard` receives the number of shards done. One shard at a time is
    held in memory. Raises ValueError if a sample was never trained on.
    """
    remove_leftovers(round_folder / "losses")
    for shard in range(corpus.num_shards):
        path = losses_path(round_folder, shard)
        if not is_intact(path, fingerprint):
            samples, losses = _seen_losses(round_folder.parent, round_number, shard)
            count = corpus.num_samples(shard)
            if len(samples) < count:
                missing = np.setdiff1d(np.arange(count), samples)
                raise ValueError(
                    f"score.budget: seen: {len(missing)} of the {count} samples of shard {shard} were never trained on "
                    f"(the first is sample {missing[0]}), so they have no seen loss; use prefix:P, full or auto in a "
                    "run with another name"
                )
            write_losses(path, corpus, shard, corpus.lengths(shard), losses, fingerprint, origin)
        on_shard(shard + 1)


def is_everything_seen(corpus: Corpus, rounds_folder: Path, round_number: int) -> bool:
    """Return whether every sample of the corpus was trained on in some round up to `round_number`."""
    return all(
        len(_seen_losses(rounds_folder, round_number, shard)[0]) == corpus.num_samples(shard)
        for shard in range(corpus.num_shards)
    )


def _seen_losses(rounds_folder: Path, round_number: int, shard: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    import duckdb

    with duckdb.connect() as connection:
        relation = last_seen(rounds_folder, round_number, f"shard = {shard}")
        columns = connection.sql(f"select sample, loss from {relation} order by sample").fetchnumpy()
    return np.asarray(columns["sample"], np.int32), np.asarray(columns["loss"], np.float32)
