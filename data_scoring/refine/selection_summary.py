"""Summaries of selections: of a dry run, which writes nothing, and of written selections."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import duckdb

from data_scoring.base.engine import LocalEngine
from data_scoring.base.sql import bounded, parquet_rows
from data_scoring.base.temporary_folders import temporary_folder
from data_scoring.refine.candidates import Draw, find_limits
from data_scoring.refine.part_bars import find_part_bars
from data_scoring.refine.policies import BATCH_LOSS
from data_scoring.refine.refine_config import RefineConfig
from data_scoring.refine.refine_shards import selection_path
from data_scoring.refine.selection import Selection

# A temperature at which losses have no effect.
_ONLY_CHANCE = 1e9


@dataclass(frozen=True)
class Slice:
    """The selection from a source, from a shard, from a part of the training order, or from everything."""

    name: str
    num_samples: int
    num_kept: int
    num_tokens_kept: int
    mean_loss: float
    mean_loss_kept: float

    @property
    def share(self) -> float:
        """Return the kept share of the samples."""
        return self.num_kept / self.num_samples


@dataclass(frozen=True)
class SelectionSummary:
    """What a selection keeps by source, by shard and in total, and its overlap with other selections.

    parts: what it keeps of each part of the training order, if the draw is within parts; the last, of the samples that
        the round did not train on, is missing if there are none.
    reasons: (reason, whether the samples are kept, number of samples), most frequent first.
    random_overlap: the share of the kept samples that a draw with the same random numbers, but without losses, also
        keeps: 1 if losses have no effect, None if it was not computed.
    last_mix_overlap: the share of the kept samples that the previous round trained on.
    """

    config: RefineConfig
    round_number: int
    sources: list[Slice]
    shards: list[Slice]
    parts: list[Slice]
    total: Slice
    reasons: list[tuple[str, bool, int]]
    random_overlap: float | None
    last_mix_overlap: float


def dry_run(draw: Draw, samples_path: Path) -> SelectionSummary:
    """Return what refining would keep, by the losses of the previous round; writes nothing.

    Raises ValueError if losses are missing or incomplete, and in all cases in which refining does.
    """
    with temporary_folder() as scratch, _counting(draw.config.memory_gb) as connection:
        engine = LocalEngine(1)
        limits, by_chance = find_limits(draw, engine, scratch), replace(draw, config=_without_losses(draw.config))
        chosen = Selection(connection, draw, limits, find_part_bars(draw, limits, engine, scratch))
        random = Selection(connection, by_chance, limits, find_part_bars(by_chance, limits, engine, scratch), "random")
        for shard in range(len(draw.num_samples)):
            _count(connection, draw, samples_path, shard, chosen.query(shard), random.query(shard))
        return _summarise(connection, draw)


def summarise_selection(draw: Draw, samples_path: Path) -> SelectionSummary:
    """Return the summary of the written selection, which is read, not drawn again."""
    with _counting(draw.config.memory_gb) as connection:
        for shard in range(len(draw.num_samples)):
            chosen = f"from {parquet_rows(selection_path(draw.target, shard))}"
            _count(connection, draw, samples_path, shard, chosen)
        return _summarise(connection, draw)


@contextmanager
def _counting(memory_gb: float) -> Iterator[duckdb.DuckDBPyConnection]:
    with temporary_folder() as folder, bounded(folder, memory_gb) as connection:
        connection.execute(
            "create table slices (shard int, part int, source varchar, samples bigint, kept bigint, tokens bigint, "
            "loss double, kept_loss double, chance bigint, last bigint)"
        )
        connection.execute("create table reasons (reason varchar, kept boolean, n bigint)")
        yield connection


def _count(
    connection: duckdb.DuckDBPyConnection,
    draw: Draw,
    samples_path: Path,
    shard: int,
    chosen: str,
    random: str | None = None,
) -> None:
    """Count a shard's samples; `chosen` is the SQL of a selection from it, `random` that of one to compare with."""
    chance = "null" if random is None else "count(*) filter (chosen.kept and random.kept)"
    part = draw.order.part() if draw.is_within_parts else "0"
    compared = "" if random is None else f"join ({random}) as random using (sample)"
    connection.execute(f"""
        insert into slices
        select {shard}, {part} as part, source, count(*), count(*) filter (chosen.kept),
            sum(num_tokens) filter (chosen.kept), sum(chosen.loss), sum(chosen.loss) filter (chosen.kept),
            {chance}, count(*) filter (chosen.kept and mix.sample notnull)
        from ({chosen}) as chosen {compared}
        join (select sample, source, num_tokens from {parquet_rows(samples_path)}
            where shard = {shard}) using (sample)
        left join (select sample, file_row_number as place from {parquet_rows(draw.scored / "mix.parquet")}
            where shard = {shard}) as mix using (sample)
        group by source, part""")
    connection.execute(f"insert into reasons select reason, kept, count(*) from ({chosen}) group by all")


def _summarise(connection: duckdb.DuckDBPyConnection, draw: Draw) -> SelectionSummary:
    [total] = _slices(connection, "'all'")
    [(chance, last)] = connection.sql("select sum(chance), sum(last) from slices").fetchall()
    return SelectionSummary(
        config=draw.config,
        round_number=draw.round_number,
        sources=_slices(connection, "source"),
        shards=_slices(connection, "shard"),
        parts=_slices(connection, "part") if draw.is_within_parts else [],
        total=total,
        reasons=connection.sql(
            "select reason, kept, sum(n)::bigint as n from reasons group by all order by n desc, reason"
        ).fetchall(),
        random_overlap=None if chance is None else _share(chance, total),
        last_mix_overlap=_share(last, total),
    )


def _share(count: int, total: Slice) -> float:
    """Return the share of the kept samples, NaN if none is kept."""
    return int(count) / total.num_kept if total.num_kept else math.nan


def _without_losses(config: RefineConfig) -> RefineConfig:
    """Return the configuration that draws as many of the same candidates by the same random numbers, without losses."""
    if not config.policy_row.needs_losses:
        return config
    if BATCH_LOSS in config.columns:
        # The samples of a batch share their random number, so the draw has to stay by batch.
        return config.model_copy(update={"temperature": _ONLY_CHANCE})
    return config.model_copy(update={"policy": "random"})


def _slices(connection: duckdb.DuckDBPyConnection, name: str) -> list[Slice]:
    rows = connection.sql(
        f"""select {name} as name, sum(samples), sum(kept), coalesce(sum(tokens), 0), sum(loss) / sum(samples),
            coalesce(sum(kept_loss) / sum(kept), 'nan'::double)
        from slices group by name order by name"""
    ).fetchall()
    return [Slice(str(row[0]), *(int(value) for value in row[1:4]), *row[4:]) for row in rows]
