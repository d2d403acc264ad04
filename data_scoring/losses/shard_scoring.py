"""Scoring: the loss of every sample, one Parquet file per shard, committed as each shard is done.

Samples are scored longest first, so that a block has samples of about equal length and little padding. The next block
is read while one is scored. Every process goes through the same blocks; only one, the writer, reads and writes files.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_scoring.base.files import remove_leftovers
from data_scoring.base.parquet import is_intact, read_parquet, write_parquet
from data_scoring.base.progress import Progress
from data_scoring.base.read_ahead import read_ahead
from data_scoring.corpus.corpus import Corpus
from data_scoring.losses.origin import Origin, with_origin

# Files of before 0.12 have no column `shard`; in all, it is also in the name.
_LOSSES = pa.schema(
    [
        ("shard", pa.int32()),
        ("sample", pa.int32()),
        ("num_tokens", pa.int32()),
        ("source", pa.dictionary(pa.int32(), pa.string())),
        ("loss", pa.float32()),
    ]
)


@dataclass(frozen=True)
class Block:
    """Samples scored together: shards and samples, [n] int64 each, truncated or padded to `seq_length` tokens."""

    shards: NDArray[np.int64]
    samples: NDArray[np.int64]
    seq_length: int


class Scorer(Protocol):
    """Scores blocks. Each process has one; all processes score the same blocks in the same order."""

    block_size: int
    is_writer: bool

    def read(self, block: Block) -> Any:
        """Return this process's share of a block's tokens; called ahead of `score`, from another thread."""

    def score(self, block: Block, share: Any) -> NDArray[np.float32] | None:
        """Return the block's losses, [n, number of prefixes] float32, on the writer, else None; `read` gave `share`."""

    def agree(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the writer's `numbers`, [n] int64, on all processes; those of the others are ignored."""


def losses_path(round_folder: Path, shard: int) -> Path:
    """Return the path of a shard's losses."""
    return round_folder / "losses" / f"shard={shard:04d}.parquet"


def write_losses(
    path: Path,
    corpus: Corpus,
    shard: int,
    num_tokens: NDArray[np.int32],
    losses: NDArray[np.float32],
    fingerprint: str,
    origin: Origin,
) -> None:
    """Write a shard's losses, [num_samples], each the mean over `num_tokens` tokens, to `path`.

    The file contains each sample's shard and source, so that readers and selection by source need no join.
    """
    known = pq.read_table(corpus.samples_path, columns=["source"], filters=[("shard", "=", shard)])
    source = known["source"].combine_chunks().cast(_LOSSES.field("source").type)
    samples, shards = np.arange(len(losses), dtype=np.int32), np.full(len(losses), shard, np.int32)
    columns = [pa.array(shards), pa.array(samples), pa.array(num_tokens), source, pa.array(losses)]
    write_parquet(path, with_origin(pa.table(columns, schema=_LOSSES), origin), fingerprint)


def check_finite(path: Path, shards: NDArray[np.int64], samples: NDArray[np.int64], losses: NDArray) -> None:
    """Raise ValueError, naming `path` and a sample, if losses, [n] or [n, prefixes], are not finite."""
    bad = np.flatnonzero(~np.isfinite(losses).reshape(len(samples), -1).all(axis=1))
    if len(bad):
        raise ValueError(
            f"{path}: sample {samples[bad[0]]} of shard {shards[bad[0]]} has the loss {losses[bad[0]]} ({len(bad)} in "
            "all are not finite); the model has diverged: lower train.lr in a run with another name"
        )


def longest_first(lengths: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return the indices, [n] int64, that sort samples by `lengths`, the longest first; the sort is stable."""
    return np.argsort(-lengths.astype(np.int64), kind="stable")


def cut_blocks(
    shards: NDArray[np.int64],
    samples: NDArray[np.int64],
    lengths: NDArray[np.integer],
    block_size: int,
    longest: int,
) -> Iterator[Block]:
    """Yield samples, given longest first, in blocks as wide as their longest sample, but at most `longest` tokens."""
    for start in range(0, len(samples), block_size):
        place = slice(start, start + block_size)
        yield Block(shards[place], samples[place], min(int(lengths[start]), longest))


def score_blocks(scorer: Scorer, blocks: Iterable[Block]) -> Iterator[tuple[Block, NDArray[np.float32] | None]]:
    """Yield each block with its losses, [n, number of prefixes] float32 on the writer, else None."""
    for block, share in read_ahead((block, scorer.read(block)) for block in blocks):
        yield block, scorer.score(block, share)


def score_samples(
    corpus: Corpus, scorer: Scorer, shards: NDArray[np.int64], samples: NDArray[np.int64], lengths: NDArray[np.integer]
) -> NDArray[np.float32] | None:
    """Return the samples' losses, [n, number of prefixes] float32, in the given order, on the writer, else None.

    `lengths` are the samples' numbers of predicted tokens, [n].
    """
    order = longest_first(lengths)
    blocks = cut_blocks(shards[order], samples[order], lengths[order], scorer.block_size, corpus.seq_length)
    parts = [losses for _, losses in score_blocks(scorer, blocks) if losses is not None]
    if not parts:
        return None
    scored = np.concatenate(parts)
    losses = np.empty_like(scored)
    losses[order] = scored
    return losses


class LossFiles:
    """The losses of a round's shards on disk; only the writer uses it.

    The losses of a complete shard are one file, in the order of its samples. Until then they are in parts, one every
    `commit_seconds`. A part holds the losses since the previous one, and its name has the number of samples before it
    in the order of `longest_first`. That order depends only on the corpus, so that a run can resume with another layout
    or micro-batch size.
    """

    def __init__(
        self,
        round_folder: Path,
        corpus: Corpus,
        longest: int,
        fingerprint: str,
        origin: Origin,
        commit_seconds: float = 60.0,
    ) -> None:
        self.longest = longest
        self._round_folder, self._corpus = round_folder, corpus
        self._parts = round_folder / "losses" / "parts"
        self._fingerprint, self._origin = fingerprint, origin
        self._commit_seconds, self._committed = commit_seconds, time.monotonic()
        self._done = np.zeros(corpus.num_shards, np.int64)
        # Samples and losses scored since the last commit, all of one shard.
        self._waiting: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = []

    def starts(self) -> NDArray[np.int64]:
        """Return how many samples of each shard, in scoring order, already have losses, [num_shards] int64.

        Deletes unusable files, and merges the parts of shards whose samples are all scored.
        """
        (self._round_folder / "losses").mkdir(parents=True, exist_ok=True)
        for folder in (self._round_folder / "losses", self._parts):
            remove_leftovers(folder)
        parts = self._list_parts()
        for shard in range(self._corpus.num_shards):
            self._done[shard] = self._find_start(shard, parts.get(shard, []))
        return self._done.copy()

    def _list_parts(self) -> dict[int, list[Path]]:
        parts: dict[int, list[Path]] = {}
        for path in sorted(self._parts.glob("*.parquet")):
            parts.setdefault(int(path.name.split("=")[1].split("-")[0]), []).append(path)
        return parts

    def _find_start(self, shard: int, parts: list[Path]) -> int:
        count = self._corpus.num_samples(shard)
        if is_intact(losses_path(self._round_folder, shard), self._fingerprint):
            self._drop(parts)
            return count
        start = 0
        for path in parts:
            if path == self._part_path(shard, start) and is_intact(path, self._fingerprint):
                start += int(pq.read_metadata(path).num_rows)
            else:
                path.unlink()
        if start == count:
            self._complete(shard)
        return start

    def _part_path(self, shard: int, start: int) -> Path:
        return self._parts / f"shard={shard:04d}-start={start:012d}.parquet"

    def append(self, block: Block, losses: NDArray[np.float32]) -> None:
        """Add the losses, [n], of a shard's next samples. Raises ValueError if one is not finite."""
        shard = int(block.shards[0])
        check_finite(losses_path(self._round_folder, shard), block.shards, block.samples, losses)
        self._waiting.append((block.samples, losses))
        self._done[shard] += len(losses)
        if self._done[shard] == self._corpus.num_samples(shard):
            self._complete(shard)
        elif time.monotonic() - self._committed >= self._commit_seconds:
            self._commit_part(shard)

    def _commit_part(self, shard: int) -> None:
        samples, losses = (np.concatenate(values) for values in zip(*self._waiting, strict=True))
        table = pa.table({"sample": samples.astype(np.int32), "loss": losses})
        write_parquet(self._part_path(shard, int(self._done[shard]) - len(losses)), table, self._fingerprint)
        self._waiting = []
        self._committed = time.monotonic()

    def _complete(self, shard: int) -> None:
        losses = np.empty(self._corpus.num_samples(shard), np.float32)
        parts = self._list_parts().get(shard, [])
        for path in parts:
            table = read_parquet(path)
            losses[table["sample"].to_numpy()] = table["loss"].to_numpy()
        for samples, values in self._waiting:
            losses[samples] = values
        num_tokens = np.minimum(self._corpus.lengths(shard), np.int32(self.longest))
        write_losses(
            losses_path(self._round_folder, shard),
            self._corpus,
            shard,
            num_tokens,
            losses,
            self._fingerprint,
            self._origin,
        )
        self._drop(parts)
        self._waiting = []
        self._committed = time.monotonic()

    def _drop(self, parts: list[Path]) -> None:
        for path in parts:
            path.unlink()
        if parts and not any(self._parts.iterdir()):
            self._parts.rmdir()


def score_shards(corpus: Corpus, scorer: Scorer, files: LossFiles, progress: Progress) -> None:
    """Score the samples of all shards that `files` does not contain yet; every process calls this.

    Raises ValueError for a corrupt shard or a loss that is not finite.
    """
    # Only the writer reads the files and shares the result. A process that is late, or whose host sees new files late,
    # would otherwise see a different state and score different blocks from the rest.
    starts = scorer.agree(files.starts() if scorer.is_writer else np.zeros(corpus.num_shards, np.int64))
    done, total = int(starts.sum()), sum(corpus.num_samples(shard) for shard in range(corpus.num_shards))
    for block, losses in score_blocks(scorer, _unscored(corpus, scorer, starts, files.longest)):
        if losses is not None:
            files.append(block, losses[:, 0])
            done += len(losses)
            progress("scoring (samples)", done, total)


def _unscored(corpus: Corpus, scorer: Scorer, starts: NDArray[np.int64], longest: int) -> Iterator[Block]:
    for shard, start in enumerate(starts.tolist()):
        if start == corpus.num_samples(shard):
            continue
        lengths = corpus.lengths(shard)
        samples = longest_first(lengths)[start:]
        yield from cut_blocks(np.full(len(samples), shard), samples, lengths[samples], scorer.block_size, longest)
