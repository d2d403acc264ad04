"""Calibration: random samples scored in full and by each prefix, to measure what cheaper scoring loses."""

from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_scoring.base.parquet import write_parquet
from data_scoring.base.progress import Progress
from data_scoring.corpus.corpus import Corpus
from data_scoring.losses.origin import Origin, with_origin
from data_scoring.losses.shard_scoring import Scorer, check_finite, score_samples


def calibration_path(round_folder: Path) -> Path:
    """Return the path of the calibration set's losses after a round."""
    return round_folder / "calibration.parquet"


def candidate_prefixes(seq_length: int) -> tuple[int, ...]:
    """Return the candidate prefixes, in tokens: an eighth, a quarter and half of `seq_length`."""
    return tuple(seq_length // divisor for divisor in (8, 4, 2))


def draw_calibration_set(
    num_samples: list[int], count: int, seed: int, round_number: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the shards and samples, [n] int64 each, of a random set of `count` samples, or of all if there are fewer.

    Each shard contributes in proportion to its size in `num_samples`. The set depends only on the arguments.
    """
    ends = np.cumsum([0, *num_samples])
    # Rounding the cumulative sum, not each quota, makes the quotas add up to `count`.
    quotas = np.diff(np.round(ends * (min(count, ends[-1]) / ends[-1])).astype(np.int64))
    generator = np.random.default_rng([seed, round_number])
    samples = [
        np.sort(generator.choice(size, int(quota), replace=False, shuffle=False))
        for size, quota in zip(num_samples, quotas, strict=True)
    ]
    return np.repeat(np.arange(len(num_samples)), quotas), np.concatenate(samples).astype(np.int64)


def draw_from(corpus: Corpus, count: int, seed: int, round_number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return a random set of the training shards' samples, as `draw_calibration_set` does."""
    num_samples = [corpus.num_samples(shard) for shard in range(corpus.num_shards)]
    return draw_calibration_set(num_samples, count, seed, round_number)


def calibrate(
    corpus: Corpus,
    round_folder: Path,
    drawn: tuple[NDArray[np.int64], NDArray[np.int64]],
    scorer: Scorer,
    fingerprint: str,
    origin: Origin,
    progress: Progress,
) -> None:
    """Score the samples `drawn` and write their losses; every process calls this.

    `scorer` scores the candidate prefixes and the whole sample in one forward pass. The columns are shard, sample,
    num_tokens, for each prefix P the loss `prefix:P`, and `loss`, that of the whole sample. Raises ValueError if a loss
    is not finite.
    """
    shards, samples = drawn
    lengths = np.empty(len(samples), np.int32)
    for shard in np.unique(shards):
        lengths[shards == shard] = corpus.lengths(int(shard))[samples[shards == shard]]
    losses = score_samples(corpus, scorer, shards, samples, lengths)
    if losses is None:
        return
    path = calibration_path(round_folder)
    check_finite(path, shards, samples, losses)
    columns = {"shard": shards.astype(np.int32), "sample": samples.astype(np.int32), "num_tokens": lengths}
    names = [*(f"prefix:{prefix}" for prefix in candidate_prefixes(corpus.seq_length)), "loss"]
    columns |= dict(zip(names, losses.T, strict=True))
    write_parquet(path, with_origin(pa.table(columns), origin), fingerprint)
    progress("calibrating (samples)", len(samples), len(samples))
