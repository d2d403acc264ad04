"""What the study's cells measured: one row for each regime, seed, arm and measure, and a table of differences."""

from pathlib import Path

import duckdb
import pyarrow as pa

from benchmarks.study.texts import NOISE
from data_scoring.base.parquet import write_parquet
from data_scoring.ledger import read_rows

# The arm that others are compared with, in pairs of one seed.
REFERENCE = "random"
PARTS = 8

# Validation losses of one run, nats per token: sources of noise do not count.
_MEASURES = f"""
with samples as (from validation_samples where round = (select max(round) from validation_samples)
        and not starts_with(source, '{NOISE}')),
    by_source as (select source, sum(loss * num_tokens) / sum(num_tokens) as loss from samples group by source)
select 'all tokens', sum(loss * num_tokens) / sum(num_tokens) from samples
union all select 'mean of sources', avg(loss) from by_source
union all select 'worst source', max(loss) from by_source
union all select 'hardest tenth', sum(loss * num_tokens) / sum(num_tokens)
    from (from samples qualify percent_rank() over (order by loss) >= 0.9)"""

# What round 1 forgot, and how far apart the losses of a shard are.
_FORGETTING = f"""
with parts as (select *, ntile({PARTS}) over (order by step, shard, sample) as part from forgetting where round = 1)
select 'share forgotten', avg((forgotten > 0)::int) from parts
union all select 'share forgotten, part ' || part, avg((forgotten > 0)::int) from parts group by part
union all select 'nats forgotten', avg(forgotten) from parts
union all select 'spread of losses in shards', avg(spread)
    from (select stddev_pop(loss) as spread from losses where round = 1 group by shard)
union all select 'tokens trained', sum(num_tokens) from steps where round = 1"""


def collect(output: Path) -> str:
    """Return the tables of all finished cells as Markdown, after writing `results.parquet` to `output`."""
    rows = []
    for cell in sorted(output.glob("*/seed-*/runs/study-compare")):
        regime, seed = cell.parents[2].name, int(cell.parents[1].name.removeprefix("seed-"))
        for run in sorted(cell.glob(f"*-seed-{seed}")):
            arm = run.name.removesuffix(f"-seed-{seed}")
            measures = read_rows(run, _MEASURES) if (run / "rounds" / _last(arm)).exists() else []
            if arm == "base":
                measures += read_rows(run, _FORGETTING)
            rows += [
                {"regime": regime, "seed": seed, "arm": arm, "measure": measure, "value": value}
                for measure, value in measures
                if value is not None
            ]
    table = pa.Table.from_pylist(rows)
    write_parquet(output / "results.parquet", table, "")
    with duckdb.connect() as connection:
        connection.register("results", table)
        return "\n\n".join([_differences(connection), _forgetting(connection)])


def _last(arm: str) -> str:
    return "1" if arm == "base" else "2"


def _differences(connection: duckdb.DuckDBPyConnection) -> str:
    """Return the differences to the reference arm, paired by seed: mean, standard error, seeds in which it is lower."""
    rows = connection.sql(
        f"""
        select mine.regime, mine.measure, mine.arm, avg(mine.value - theirs.value),
            stddev_samp(mine.value - theirs.value) / sqrt(count(*)), count(*) filter (mine.value < theirs.value),
            count(*)
        from results as mine join results as theirs using (regime, seed, measure)
        where theirs.arm = '{REFERENCE}' and mine.arm not in ('{REFERENCE}', 'base')
        group by all order by mine.regime, mine.measure, 4"""
    ).fetchall()
    lines = ["| regime | measure | arm | difference to random | lower in |", "|---|---|---|---:|---:|"]
    for regime, measure, arm, mean, error, lower, count in rows:
        spread = "" if error is None else f" ± {error:.4f}"
        lines.append(f"| {regime} | {measure} | {arm} | {mean:+.4f}{spread} | {lower} of {count} |")
    return "\n".join(lines)


def _forgetting(connection: duckdb.DuckDBPyConnection) -> str:
    rows = connection.sql(
        """select regime, measure, avg(value), min(value), max(value) from results
        where arm = 'base' group by all order by regime, measure"""
    ).fetchall()
    lines = ["| regime | after round 1 | mean | least | most |", "|---|---|---:|---:|---:|"]
    lines += [
        f"| {regime} | {measure} | {mean:.4f} | {least:.4f} | {most:.4f} |"
        for regime, measure, mean, least, most in rows
    ]
    return "\n".join(lines)
