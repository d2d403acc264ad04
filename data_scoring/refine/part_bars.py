"""The bars of the parts of the training order, found before any shard's samples are selected: a task for each part."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from data_scoring.base.engine import Count, Engine, Part, Result, Work, reporting
from data_scoring.base.files import writing
from data_scoring.base.progress import silent
from data_scoring.base.sql import bounded_worker, copy_to_parquet, parquet_rows
from data_scoring.refine.bars import Bar, Buckets, find_bar, naming_policy
from data_scoring.refine.candidates import Draw, Limits, batch_losses_query, candidates_query, check_losses
from data_scoring.refine.policies import keeping_policies

if TYPE_CHECKING:
    import duckdb


@dataclass(frozen=True)
class PartBars:
    """The bars of all parts of the training order, for candidates in `buckets`.

    batch_losses: the file of the mean losses of batches, if batches are drawn.
    """

    buckets: Buckets
    bars: dict[int, Bar]
    batch_losses: Path | None


def find_part_bars(draw: Draw, limits: Limits, engine: Engine, scratch: Path) -> PartBars | None:
    """Return the bars of the parts of the training order, or None if the draw is within shards.

    Files that selecting needs, and what connections spill, are in the folder `scratch`. Raises ValueError if losses are
    missing or incomplete, a score is not finite, or floors exceed the sampling rate.
    """
    if not draw.is_within_parts:
        return None
    for shard in range(len(draw.num_samples)):
        check_losses(draw, shard)
    losses = scratch / "batch-losses.parquet" if draw.config.is_by_batch else None
    if losses is not None:
        _map_one(engine, partial(_write_batch_losses, draw, limits), draw, losses)
    space = _Space(draw, limits, losses, scratch, draw.config.memory_gb)
    buckets = _map_one(engine, partial(_find_buckets, space), draw, 0)
    # The last stratum has the samples that the round did not train on.
    parts = range(draw.num_parts + 1)
    space = _Space(draw, limits, losses, scratch, draw.memory_gb(engine, len(parts)))
    work = keeping_policies(partial(_find_part_bar, space, buckets))
    found = engine.map(work, parts, reporting(silent, ""), draw.is_long)
    return PartBars(buckets, dict(enumerate(found)), losses)


def _map_one(engine: Engine, work: Work[Part, Result], draw: Draw, part: Part) -> Result:
    """Return the result of work that is not divided."""
    [result] = engine.map(keeping_policies(work), [part], reporting(silent, ""), draw.is_long)
    return result


def _write_batch_losses(draw: Draw, limits: Limits, path: Path, count: Count) -> None:
    # All compare with these: sums of floating-point numbers depend on their order, so others may differ a little.
    if path.exists():
        return
    with (
        naming_policy(draw.config),
        bounded_worker(path.parent, draw.config.memory_gb) as connection,
        writing(path) as temporary,
    ):
        connection.execute(copy_to_parquet(batch_losses_query(draw, limits), temporary, "compression zstd"))


def view_batch_losses(connection: "duckdb.DuckDBPyConnection", path: Path | None) -> None:
    """Create the view `batch_losses`, which candidates within parts need, of the file `path`, if there is one."""
    if path is not None:
        connection.execute(f"create or replace temp view batch_losses as from {parquet_rows(path)}")


@dataclass(frozen=True)
class _Space:
    """What the tasks share: the draw, and where its candidates are looked at."""

    draw: Draw
    limits: Limits
    batch_losses: Path | None
    scratch: Path
    memory_gb: float

    @contextmanager
    def open(self) -> Iterator["duckdb.DuckDBPyConnection"]:
        with naming_policy(self.draw.config), bounded_worker(self.scratch, self.memory_gb) as connection:
            view_batch_losses(connection, self.batch_losses)
            yield connection


def _find_buckets(space: _Space, shard: int, count: Count) -> Buckets:
    """Return buckets that suit the candidates of a shard, and so, as shards are random, all."""
    with space.open() as connection:
        return Buckets.of(connection, f"({candidates_query(space.draw, space.limits, shard)})")


def _find_part_bar(space: _Space, buckets: Buckets, part: int, count: Count) -> Bar:
    """Return the bar of a part, from a table of its candidates in all shards."""
    draw = space.draw
    relation = " union all ".join(candidates_query(draw, space.limits, shard) for shard in range(len(draw.num_samples)))
    with space.open() as connection:
        connection.execute(f"create temp table candidates as from ({relation}) where stratum = {part}")
        return find_bar(connection, draw.config, buckets.label("candidates", draw.config))
