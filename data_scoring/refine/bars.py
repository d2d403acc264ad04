"""The bars of a draw's strata: what a candidate of a shard, or of a part of the training order, needs to be kept.

The candidates with the highest keys are kept, subject to floors and ceilings for sources. A first scan counts keys in
buckets, which gives the bucket of each source's cut. A second scan reads and sorts only the rows of those buckets. The
stratum is never sorted as a whole, which would need memory for all of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from data_scoring.base.messages import one_line, shown
from data_scoring.base.sql import literal
from data_scoring.refine.candidates import LATE
from data_scoring.refine.draw import inclusion_probability, num_kept
from data_scoring.refine.policies import BATCH_LOSS
from data_scoring.refine.refine_config import RefineConfig

if TYPE_CHECKING:
    import duckdb

# Enough that a bucket at a cut has about a thousandth of the samples, and few enough that counting costs nothing.
_NUM_BUCKETS = 4096
# The first rows give the range of the buckets; keys outside go into the outermost buckets.
_RANGE_ROWS = 50_000
# Below every bucket: no cut.
_BOTTOM = -1
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


def name_policy(config: RefineConfig) -> str:
    """Return the field that decides the score, and its value, for messages."""
    return f"refine.sql: {shown(config.sql)}" if config.policy_row.score is None else f"refine.policy: {config.policy}"


@contextmanager
def naming_policy(config: RefineConfig) -> Iterator[None]:
    """Convert DuckDB's errors in computing scores to ValueError."""
    import duckdb

    try:
        yield
    except (duckdb.ConversionException, duckdb.OutOfRangeException, duckdb.InvalidInputException) as error:
        raise ValueError(
            f"{name_policy(config)} cannot be computed for every sample ({one_line(error)}); correct it"
        ) from None


@dataclass(frozen=True)
class Buckets:
    """Buckets of keys, from `low` on. They affect only the speed, not the result."""

    low: float
    width: float

    @classmethod
    def of(cls, connection: "duckdb.DuckDBPyConnection", relation: str) -> "Buckets":
        """Return buckets that suit the first candidates of `relation`."""
        [(low, high)] = connection.sql(
            f"""select min(key), max(key) from (select * from {relation} limit {_RANGE_ROWS})
            where excluded is null and not is_fresh and isfinite(key)"""
        ).fetchall()
        if low is None or high <= low:
            return cls(low or 0.0, 1.0)
        return cls(low, max((high - low) / _NUM_BUCKETS, np.finfo(float).tiny))

    def label(self, relation: str, config: RefineConfig) -> str:
        """Return the SQL relation of candidates with their `bucket` and their group, `category`."""
        place = f"floor((key - {self.low!r}::double) / {self.width!r}::double)"
        bucket = f"greatest(0, least({_NUM_BUCKETS - 1}, {place}))::int"
        return f"(select *, {_group(config)} as category, {bucket} as bucket from {relation})"


@dataclass(frozen=True)
class Bar:
    """What a candidate of one stratum needs to be kept, as SQL.

    kept: the condition that it is within the cut of its group; wins: that it would be without floors and ceilings;
    probability: with which the draw keeps it, for a kept one; is_ruled: whether there are floors or ceilings.
    """

    kept: str
    wins: str
    probability: str
    is_ruled: bool


def find_bar(connection: "duckdb.DuckDBPyConnection", config: RefineConfig, bucketed: str) -> Bar:
    """Return the bar of the stratum whose candidates are in `bucketed`."""
    cuts = find_cuts(_count(connection, config, bucketed), config)
    last, contest = _find_places(connection, cuts, bucketed)
    kept = _by_group({name: _from(cut.bucket, last.get(name)) for name, cut in cuts.groups.items()})
    probability = "null"
    if config.weights == "inverse":
        probability = _find_probabilities(connection, config, cuts, kept, bucketed)
    is_ruled = len(cuts.groups) > 1 or "" not in cuts.groups
    return Bar(kept, _from(cuts.bucket, contest), probability, is_ruled)


def _group(config: RefineConfig) -> str:
    """Return the SQL expression of a candidate's group: its source if that has a floor or a ceiling, else ''."""
    ruled = [rule.name for rule in config.sources if rule.at_least > 0 or rule.at_most < 1]
    return f"case when source in ({', '.join(map(literal, ruled))}) then source else '' end" if ruled else "''"


@dataclass(frozen=True)
class Counts:
    """A group's candidates by bucket, [_NUM_BUCKETS] int64, and its number of samples, including excluded ones."""

    by_bucket: NDArray[np.int64]
    num_samples: int


def _count(connection: "duckdb.DuckDBPyConnection", config: RefineConfig, bucketed: str) -> dict[str, Counts]:
    if config.score not in _FINITE_SCORES:
        _check_finite(connection, config, bucketed)
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


def _check_finite(connection: "duckdb.DuckDBPyConnection", config: RefineConfig, bucketed: str) -> None:
    bad = connection.sql(
        f"""select shard, sample from {bucketed}
        where excluded is null and not is_fresh and (key is null or not isfinite(key)) order by all limit 1"""
    ).fetchall()
    for shard, sample in bad:
        raise ValueError(
            f"{name_policy(config)}: the score of sample {sample} of shard {shard} is not finite; samples never "
            "trained on have no seen_loss, so write coalesce(seen_loss, 0), for example"
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
            f"refine.sources: the floors (at_least) require {sum(floors.values())} samples of a {config.within} of "
            f"which sampling_rate {config.sampling_rate:g} keeps {wanted}; lower them, or raise sampling_rate"
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


def _by_group(values: dict[str, str], default: str = "false") -> str:
    """Return the SQL expression with the value in `values` of a candidate's group; `default` without groups."""
    if len(set(values.values())) <= 1:
        return next(iter(values.values()), default)
    return f"case category {' '.join(f'when {literal(name)} then {value}' for name, value in values.items())} end"


@dataclass(frozen=True)
class Place:
    """A candidate's place in the order: by key, then by random bits, then by shard and sample."""

    key: float
    bits: int
    shard: int
    sample: int

    def or_higher(self) -> str:
        """Return the SQL condition that a candidate has this place or a higher one."""
        # Casting from a string restores the number exactly.
        key = f"'{self.key!r}'::double"
        earlier = f"(shard < {self.shard} or (shard = {self.shard} and sample <= {self.sample}))"
        ties = f"bits > {self.bits}::ubigint or (bits = {self.bits}::ubigint and {earlier})"
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
    order = "key desc, bits desc, shard, sample"
    rows = connection.sql(f"""
        with ranked as (
            select category, bucket, key, bits, shard, sample,
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
        select category, key, bits, shard, sample, false as is_contested from decided
        where status = 'kept' or (status = 'contested' and is_won)
        qualify row_number() over (partition by category order by key, bits, shard desc, sample desc) = 1
        union all
        (select category, key, bits, shard, sample, true from decided where status = 'contested' and is_won
        order by key, bits, shard desc, sample desc limit 1)""").fetchall()
    last = {row[0]: Place(*row[1:5]) for row in rows if not row[5]}
    return last, next((Place(*row[1:5]) for row in rows if row[5]), None)


def _from(bucket: int, place: Place | None) -> str:
    """Return the SQL condition that a candidate is at `place` or higher, or, if None, above `bucket`."""
    return place.or_higher() if place else f"bucket > {bucket}"


def _find_probabilities(
    connection: "duckdb.DuckDBPyConnection", config: RefineConfig, cuts: Cuts, kept: str, bucketed: str
) -> str:
    """Return the SQL expression of the probability with which the draw keeps a kept candidate, given the others' keys.

    That is the probability that its key exceeds the threshold from which on it would be kept. In a group of which no
    more than the floor is kept, this is the group's largest key that is not kept. In others, it is the largest such key
    of the group itself and of all groups below their ceilings. A draw without scores keeps each sample of a group with
    equal probability. Without noise, what is kept is certain.
    """
    rows = connection.sql(
        f"""select category, count(*) filter (is_within), count(*), max(key) filter (not is_within)
        from (select *, {kept} as is_within from {bucketed})
        where excluded is null and not is_fresh group by category"""
    ).fetchall()
    certain = "1.0::double"
    if not config.policy_row.needs_losses:
        return _by_group({name: f"{count / total!r}::double" for name, count, total, _ in rows}, certain)
    if config.draw_temperature == 0:
        return certain
    dropped = {name: first for name, _, _, first in rows if first is not None}
    contested = [dropped[name] for name, count, *_ in rows if name in dropped and count < cuts.groups[name].ceiling]
    probabilities = {}
    for name, count, *_ in rows:
        keys = [dropped[name]] if name in dropped else []
        if count > cuts.groups[name].floor:
            keys += contested
        probabilities[name] = inclusion_probability("log_weight", max(keys, default=None))
    return _by_group(probabilities, certain)
