"""Exact selection from a shard's candidates in bounded memory.

The candidates with the highest keys are kept, subject to floors and ceilings for sources. A first scan counts keys in
buckets, which gives the bucket of each source's cut. A second scan reads and sorts only the rows of those buckets. A
third scan writes every sample's result. The shard is never sorted as a whole, which would need memory for all of it,
and DuckDB spills to disk.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from data_scoring.base.messages import one_line, shown
from data_scoring.base.sql import literal
from data_scoring.refine.candidates import EXCLUSIONS, LATE, Draw, Limits, candidates_query, check_losses, is_joined
from data_scoring.refine.draw import num_kept
from data_scoring.refine.policies import BATCH_LOSS, POLICIES
from data_scoring.refine.refine_config import RefineConfig

if TYPE_CHECKING:
    import duckdb

# Enough that a bucket at a cut has about a thousandth of the samples, and few enough that counting costs nothing.
_NUM_BUCKETS = 4096
# The first rows give the range of the buckets; keys outside go into the outermost buckets.
_RANGE_ROWS = 50_000
# Below every bucket: no cut.
_BOTTOM = -1

FRESH = "its source joins now"
FLOOR, CEILING, NOT_DRAWN = "floor of its source", "ceiling of its source", "not drawn"
# Scores that are finite for every sample with a loss; other scores are checked.
_FINITE_SCORES = ("0", "loss", BATCH_LOSS)


@dataclass(frozen=True)
class Cut:
    """The cut of one group of candidates: a source with a rule, or all other sources.

    Buckets above `bucket` are kept, those below are not. In `bucket`, ranks in the group up to `floor` are kept and
    ranks beyond `ceiling` are not; `above` candidates of the group are in higher buckets.
    """

    bucket: int
    above: int
    floor: int
    ceiling: int


@dataclass(frozen=True)
class Cuts:
    """The cuts of all groups; `contested` more candidates, between floor and ceiling, are kept of `bucket`."""

    groups: dict[str, Cut]
    bucket: int
    contested: int


def select(
    connection: "duckdb.DuckDBPyConnection", draw: Draw, limits: Limits, shard: int, name: str = "chosen"
) -> str:
    """Return the SQL of a shard's selection, rows (sample, loss, kept, reason) in the order of the losses.

    May create a table on `connection` whose name begins with `name`. Raises ValueError if losses are missing or
    incomplete, a score is not finite, or floors exceed the sampling rate.
    """
    import duckdb

    check_losses(draw, shard)
    try:
        return _select(connection, draw, limits, shard, name)
    except (duckdb.ConversionException, duckdb.OutOfRangeException, duckdb.InvalidInputException) as error:
        raise ValueError(
            f"{_policy(draw.config)} cannot be computed for every sample ({one_line(error)}); correct it"
        ) from None


def _policy(config: RefineConfig) -> str:
    return f"refine.sql: {shown(config.sql)}" if config.policy_row.score is None else f"refine.policy: {config.policy}"


def _reason_type() -> str:
    """Return the SQL type of reasons: an enumeration, which is several times faster to write than strings."""
    drawn = (policy.reason for policy in POLICIES.values())
    reasons = dict.fromkeys([*drawn, *EXCLUSIONS, FRESH, FLOOR, CEILING, NOT_DRAWN])
    return f"enum ({', '.join(map(literal, reasons))})"


def _select(connection: "duckdb.DuckDBPyConnection", draw: Draw, limits: Limits, shard: int, name: str) -> str:
    relation = f"({candidates_query(draw, limits, shard)})"
    if is_joined(draw):
        connection.execute(f"create or replace temp table {name}_candidates as from {relation}")
        relation = f"{name}_candidates"
    connection.execute(f"create type if not exists reason as {_reason_type()}")
    group = _group(draw.config)
    low, width = _range(connection, relation)
    bucket = f"greatest(0, least({_NUM_BUCKETS - 1}, floor((key - {low!r}::double) / {width!r}::double)))::int"
    bucketed = f"(select *, {group} as category, {bucket} as bucket from {relation})"
    cuts = find_cuts(_count(connection, draw, shard, bucketed), draw.config)
    return _selection(draw.config, cuts, bucketed, *_find_places(connection, cuts, bucketed))


def _group(config: RefineConfig) -> str:
    """Return the SQL expression of a candidate's group: its source if that has a floor or a ceiling, else ''."""
    ruled = [rule.name for rule in config.sources if rule.at_least > 0 or rule.at_most < 1]
    return f"case when source in ({', '.join(map(literal, ruled))}) then source else '' end" if ruled else "''"


def _range(connection: "duckdb.DuckDBPyConnection", relation: str) -> tuple[float, float]:
    """Return the buckets' lower bound and width. They affect only the speed, not the result."""
    [(low, high)] = connection.sql(
        f"""select min(key), max(key) from (select * from {relation} limit {_RANGE_ROWS})
        where excluded is null and not is_fresh and isfinite(key)"""
    ).fetchall()
    if low is None or high <= low:
        return low or 0.0, 1.0
    return low, max((high - low) / _NUM_BUCKETS, np.finfo(float).tiny)


@dataclass(frozen=True)
class Counts:
    """A group's candidates by bucket, [_NUM_BUCKETS] int64, and its number of samples, including excluded ones."""

    by_bucket: NDArray[np.int64]
    num_samples: int


def _count(connection: "duckdb.DuckDBPyConnection", draw: Draw, shard: int, bucketed: str) -> dict[str, Counts]:
    if draw.config.score not in _FINITE_SCORES:
        _check_finite(connection, draw, shard, bucketed)
    rows = connection.sql(
        f"""select category, case when excluded is null then bucket else {_BOTTOM} end as place, count(*)
        from {bucketed} where not is_fresh and excluded is distinct from '{LATE}' group by category, place"""
    ).fetchall()
    counts: dict[str, Counts] = {}
    for category in {row[0] for row in rows}:
        mine = [(place, count) for name, place, count in rows if name == category]
        by_bucket = np.zeros(_NUM_BUCKETS, np.int64)
        for place, count in mine:
            if place != _BOTTOM:
                by_bucket[place] = count
        counts[category] = Counts(by_bucket, sum(count for _, count in mine))
    return counts


def _check_finite(connection: "duckdb.DuckDBPyConnection", draw: Draw, shard: int, bucketed: str) -> None:
    [(bad,)] = connection.sql(
        f"""select min(sample) from {bucketed}
        where excluded is null and not is_fresh and (key is null or not isfinite(key))"""
    ).fetchall()
    if bad is not None:
        raise ValueError(
            f"{_policy(draw.config)}: the score of sample {bad} of shard {shard} is not finite; samples never trained "
            "on have no seen_loss, so write coalesce(seen_loss, 0), for example"
        )


def find_cuts(counts: dict[str, Counts], config: RefineConfig) -> Cuts:
    """Return the cut of each group such that, within floors and ceilings, the N0 highest keys are kept.

    N0 counts all samples, including excluded ones; if fewer candidates may be kept, all of them are. Raises ValueError
    if the floors alone exceed N0.
    """
    rules = {rule.name: rule for rule in config.sources}
    floors, ceilings, at_least = {}, {}, {}
    for name, group in counts.items():
        candidates = int(group.by_bucket.sum())
        rule = rules.get(name)
        floors[name] = min(candidates, int(rule.at_least * group.num_samples)) if rule else 0
        ceilings[name] = min(candidates, int(rule.at_most * group.num_samples + 0.5)) if rule else candidates
        # [bucket]: the number of candidates in it or above.
        at_least[name] = np.cumsum(group.by_bucket[::-1])[::-1]
    wanted = num_kept(sum(group.num_samples for group in counts.values()), config.draw_rate) if counts else 0
    if sum(floors.values()) > wanted:
        raise ValueError(
            f"refine.sources: the floors (at_least) require {sum(floors.values())} samples of a shard of which "
            f"sampling_rate {config.sampling_rate:g} keeps {wanted}; lower them, or raise sampling_rate"
        )
    wanted = min(wanted, sum(ceilings.values()))
    kept_from = sum(np.clip(at_least[name], floors[name], ceilings[name]) for name in counts)
    # The highest bucket that, with all buckets above it, has enough candidates.
    bucket = int(np.flatnonzero(kept_from >= wanted)[-1]) if counts else 0
    groups, settled = {}, 0
    for name in counts:
        # Two more entries, since a group that keeps nothing is cut above all buckets.
        above = np.append(at_least[name], [0, 0])
        settled += min(max(int(above[bucket + 1]), floors[name]), ceilings[name])
        floor_bucket = _bucket_of(above, floors[name])
        ceiling_bucket = _bucket_of(above, ceilings[name]) if ceilings[name] < above[0] else _BOTTOM
        cut = min(floor_bucket, max(bucket, ceiling_bucket))
        groups[name] = Cut(cut, int(above[cut + 1]), floors[name], ceilings[name])
    return Cuts(groups, bucket, wanted - settled)


def _bucket_of(above: NDArray[np.int64], rank: int) -> int:
    """Return the bucket of the candidate with a rank, counted from 1; for rank 0, one above all buckets.

    `above` counts the candidates in or above each bucket.
    """
    return int(np.flatnonzero(above >= rank)[-1]) if rank else _NUM_BUCKETS


def _by_group(values: dict[str, str]) -> str:
    """Return the SQL expression with the value in `values` of a candidate's group."""
    if len(set(values.values())) <= 1:
        return next(iter(values.values()), "false")
    return f"case category {' '.join(f'when {literal(name)} then {value}' for name, value in values.items())} end"


@dataclass(frozen=True)
class Place:
    """A candidate's place in the order: by key, then by random bits, then by sample index."""

    key: float
    bits: int
    sample: int

    def or_higher(self) -> str:
        """Return the SQL condition that a candidate has this place or a higher one."""
        # Casting from a string restores the number exactly.
        key = f"'{self.key!r}'::double"
        ties = f"bits > {self.bits}::ubigint or (bits = {self.bits}::ubigint and sample <= {self.sample})"
        return f"(key > {key} or (key = {key} and ({ties})))"


def _find_places(
    connection: "duckdb.DuckDBPyConnection", cuts: Cuts, bucketed: str
) -> tuple[dict[str, Place], Place | None]:
    """Return the last place that each group keeps in its cut's bucket, and the last contested place that is kept.

    Groups that keep no place in that bucket are not listed; the contested place is None if there is none.
    """
    if not cuts.groups:
        return {}, None
    cut, above, floor, ceiling = (
        _by_group({name: str(getattr(group, field)) for name, group in cuts.groups.items()})
        for field in ("bucket", "above", "floor", "ceiling")
    )
    order = "key desc, bits desc, sample"
    rows = connection.sql(f"""
        with ranked as (
            select category, bucket, key, bits, sample,
                {above} + row_number() over (partition by category order by {order}) as rank
            from {bucketed} where excluded is null and not is_fresh and bucket = {cut}
        ), labelled as (
            select *, case when rank <= {floor} then 'kept' when rank > {ceiling} then 'dropped'
                when bucket > {cuts.bucket} then 'kept' when bucket = {cuts.bucket} then 'contested' else 'dropped' end
                as status
            from ranked
        ), decided as (
            select *, row_number() over (partition by status order by {order}) <= {cuts.contested} as is_won
            from labelled
        )
        select category, key, bits, sample, false as is_contested from decided
        where status = 'kept' or (status = 'contested' and is_won)
        qualify row_number() over (partition by category order by key, bits, sample desc) = 1
        union all
        (select category, key, bits, sample, true from decided where status = 'contested' and is_won
        order by key, bits, sample desc limit 1)""").fetchall()
    last = {row[0]: Place(*row[1:4]) for row in rows if not row[4]}
    return last, next((Place(*row[1:4]) for row in rows if row[4]), None)


def _from(bucket: int, place: Place | None) -> str:
    """Return the SQL condition that a candidate is at `place` or higher, or, if None, above `bucket`."""
    return place.or_higher() if place else f"bucket > {bucket}"


def _selection(config: RefineConfig, cuts: Cuts, bucketed: str, last: dict[str, Place], contest: Place | None) -> str:
    kept = _by_group({name: _from(cut.bucket, last.get(name)) for name, cut in cuts.groups.items()})
    reason, wins = literal(config.policy_row.reason), _from(cuts.bucket, contest)
    reasons = f"when is_within then {reason}::reason else '{NOT_DRAWN}'::reason"
    if len(cuts.groups) > 1 or "" not in cuts.groups:
        reasons = (
            f"when is_within then case when {wins} then {reason}::reason else '{FLOOR}'::reason end "
            f"when {wins} then '{CEILING}'::reason else '{NOT_DRAWN}'::reason"
        )
    return f"""
        select sample, loss, excluded is null and (is_fresh or is_within) as kept,
            case when excluded is not null then excluded::reason when is_fresh then '{FRESH}'::reason {reasons} end
                as reason
        from (select *, {kept} as is_within from {bucketed})"""
