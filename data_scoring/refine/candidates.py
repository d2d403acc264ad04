"""The candidates of a draw: a shard's samples with their losses, reasons for exclusion, strata and scores.

A stratum is what the draw keeps an equal share of: a shard, or a part of the previous round's training order.

Everything is streaming SQL over the Parquet files of earlier rounds.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_scoring.base.engine import Count, Engine, reporting
from data_scoring.base.progress import silent
from data_scoring.base.sql import bounded_worker, literal, parquet_rows, random_bits
from data_scoring.losses.shard_scoring import losses_path
from data_scoring.refine.draw import draw_key, log_weight_of
from data_scoring.refine.policies import BATCH_LOSS, JOINS, REFERENCE_LOSS, keeping_policies
from data_scoring.refine.refine_config import RefineConfig
from data_scoring.refine.training_order import TrainingOrder

# Losses are counted in bins of 1/1024 nats, so that medians and quantiles take bounded memory and are reproducible.
_BINS_PER_NAT = 1024
# Outliers cannot be identified among fewer losses.
_FEWEST_FOR_OUTLIERS = 20
# Converts the median absolute deviation of a normal distribution to its standard deviation.
_MAD_TO_DEVIATION = 1.4826

# Why samples are excluded. Shares do not count samples of sources that join later.
LATE = "its source joins later"
CONTAMINATED = "contaminated"
SHORT, OUTLIER, REPEATED = "too few tokens", "outlier", "near duplicate"
WORN, HARDEST = "trained on often enough", "among the hardest"
EXCLUSIONS = (LATE, CONTAMINATED, SHORT, OUTLIER, REPEATED, WORN, HARDEST)

# Scans of this many samples or more take about a minute.
_LONG_SAMPLES = 100_000_000

# By name of a stratum or a source: bins, ascending, and the numbers of losses in them, [n] int64 each.
_LossCounts = dict[Any, tuple[NDArray[np.int64], NDArray[np.int64]]]


@dataclass(frozen=True)
class Draw:
    """The inputs and the configuration of a round's draw.

    rounds: the folder of the rounds' folders.
    num_samples: each shard's number of samples.
    num_parts: the number of parts of the training order.
    duplicates: the file that lists near duplicates, if they are excluded.
    contaminated: the file that lists samples that overlap with evaluation items, if they are excluded.
    """

    rounds: Path
    round_number: int
    config: RefineConfig
    seed: int
    num_samples: list[int]
    duplicates: Path | None = None
    contaminated: Path | None = None
    num_parts: int = 8

    @property
    def target(self) -> Path:
        """Return the folder of the round that will train on the selection."""
        return self.rounds / str(self.round_number)

    @property
    def scored(self) -> Path:
        """Return the folder of the round whose losses are used."""
        return self.rounds / str(self.round_number - 1)

    @property
    def is_within_parts(self) -> bool:
        """Return whether strata are parts of the training order, not shards."""
        return self.config.within == "part"

    @cached_property
    def order(self) -> "TrainingOrder":
        """Return the training order of the round whose losses are used."""
        return TrainingOrder.open(self.scored, self.num_parts)

    @property
    def is_long(self) -> bool:
        """Return whether scans of all samples take so long that starting processes for them pays."""
        return sum(self.num_samples) >= _LONG_SAMPLES

    def memory_gb(self, engine: Engine, num_parts: int) -> float:
        """Return the share of the memory limit, GB, that each worker has for a map of `num_parts` parts."""
        return self.config.memory_gb / engine.num_workers(num_parts, self.is_long)

    def losses(self, shard: int) -> str:
        """Return the SQL relation of a shard's losses."""
        return parquet_rows(losses_path(self.scored, shard))


def check_losses(draw: Draw, shard: int) -> None:
    """Raise ValueError if a shard's losses, or its reference losses, are missing or incomplete."""
    _check_file(losses_path(draw.scored, shard), draw.num_samples[shard], "score the round")
    if REFERENCE_LOSS in draw.config.columns:
        path = losses_path(Path(str(draw.config.reference)), shard)
        _check_file(path, draw.num_samples[shard], "score the reference (refine.reference)")


def _check_file(path: Path, expected: int, remedy: str) -> None:
    """Check only the file's footer, which has the numbers of rows and of missing values."""
    if not path.exists():
        raise ValueError(f"{path}: no such file; {remedy} first with `reprise score`")
    try:
        metadata = pq.read_metadata(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: cannot be read ({error}); delete it and {remedy} again") from None
    names = metadata.schema.names
    if not {"loss", "source"} <= set(names):
        raise ValueError(f"{path}: has {', '.join(names)}, but no source or loss; delete it and {remedy} again")
    groups = [metadata.row_group(number).column(names.index("loss")) for number in range(metadata.num_row_groups)]
    nulls = sum(group.statistics.null_count for group in groups if group.statistics is not None)
    counted = (metadata.num_rows, metadata.num_rows - nulls)
    if counted != (expected, expected):
        raise ValueError(
            f"{path}: {counted} rows and losses, but the shard has {expected} samples; delete it and {remedy} again"
        )


@dataclass(frozen=True)
class Limits:
    """Loss limits, nats: above them, a sample is an outlier of its source, or among the hardest of its stratum."""

    outlier: dict[str, float] = field(default_factory=dict)
    hardest: dict[int, float] = field(default_factory=dict)


def find_limits(draw: Draw, engine: Engine, scratch: Path) -> Limits:
    """Return the limits of the draw's configuration, computed from losses counted in bins, shard by shard.

    The robust z-score of a loss is its distance from its source's median, divided by 1.4826 times the median absolute
    deviation; a loss above `outlier_z` is an outlier. Sources with fewer than 20 samples, or with equal losses, have no
    limit. The connections of `engine` spill under `scratch`. Raises ValueError if losses are missing or incomplete.
    """
    config, limits = draw.config, Limits()
    groups = []
    if config.policy_row.drops_hardest:
        groups.append("stratum")
    if config.outlier_z is not None:
        groups.append("source")
    if not groups:
        return limits
    shards = range(len(draw.num_samples))
    work = partial(_count_losses, draw, groups, scratch, draw.memory_gb(engine, len(shards)))
    counts: dict[str, _LossCounts] = {group: {} for group in groups}
    for found in engine.map(keeping_policies(work), shards, reporting(silent, ""), draw.is_long):
        for group in groups:
            _add(counts[group], found[group])
    for stratum, (bins, numbers) in sorted(counts.get("stratum", {}).items()):
        # The bin's upper edge: losses in the last bin cannot be distinguished, and are kept.
        limits.hardest[stratum] = _quantile(_losses_of(bins), numbers, 1 - config.drop_hardest) + 0.5 / _BINS_PER_NAT
    for source, (bins, numbers) in sorted(counts.get("source", {}).items()):
        assert config.outlier_z is not None
        losses = _losses_of(bins)
        median = _quantile(losses, numbers, 0.5)
        deviation = _MAD_TO_DEVIATION * _quantile(abs(losses - median), numbers, 0.5)
        if numbers.sum() >= _FEWEST_FOR_OUTLIERS and deviation > 0:
            limits.outlier[source] = median + config.outlier_z * deviation
    return limits


def _count_losses(
    draw: Draw, groups: list[str], scratch: Path, memory_gb: float, shard: int, count: Count
) -> dict[str, _LossCounts]:
    """Return the counts of a shard's losses, by each of `groups`: stratum or source."""
    check_losses(draw, shard)
    stratum, join = (draw.order.part(), draw.order.join(shard)) if draw.is_within_parts else (str(shard), "")
    with bounded_worker(scratch, memory_gb) as connection:
        connection.execute(
            f"create temp table loss_counts as select {stratum} as stratum, source, "
            f"floor(least(loss, 1e6) * {_BINS_PER_NAT})::int as bin, count(*) as n from {draw.losses(shard)} {join} "
            "group by stratum, source, bin"
        )
        found: dict[str, _LossCounts] = {}
        for group in groups:
            rows = connection.sql(
                f"select {group}, list(bin order by bin), list(n order by bin) from (select {group}, bin, "
                f"sum(n)::bigint as n from loss_counts group by {group}, bin) group by {group}"
            ).fetchall()
            found[group] = {name: (np.array(bins), np.array(numbers)) for name, bins, numbers in rows}
    return found


def _add(counts: _LossCounts, more: _LossCounts) -> None:
    """Add `more` to `counts`."""
    for name, (bins, numbers) in more.items():
        if name in counts:
            # [2 * n]: the counts are whole numbers below 2^53, which float64 holds exactly.
            merged, places = np.unique(np.concatenate([counts[name][0], bins]), return_inverse=True)
            summed = np.bincount(places, np.concatenate([counts[name][1], numbers]))
            counts[name] = merged, summed.astype(np.int64)
        else:
            counts[name] = bins, numbers


def _losses_of(bins: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the losses at the centres of bins."""
    return np.asarray((bins + 0.5) / _BINS_PER_NAT)


def _quantile(values: NDArray[Any], counts: NDArray[Any], share: float) -> float:
    """Return the smallest of `values`, weighted by `counts`, that at least `share` of them do not exceed."""
    order = np.argsort(values)
    covered = np.cumsum(counts[order])
    return float(values[order][np.searchsorted(covered, share * covered[-1])])


def candidates_query(draw: Draw, limits: Limits, shard: int) -> str:
    """Return the SQL of a shard's candidates, one row per sample, in the order of the losses file.

    Columns: shard; sample; source; loss; stratum, the shard or the part; excluded, the reason for exclusion or null;
    is_fresh, whether the source joins in this round; key, of which the highest are kept; bits, 64 random bits, which
    break ties; with weights, also log_weight, the key without its noise. If batches are drawn within parts, the table
    `batch_losses` has to exist (`batch_losses_query`).
    """
    config = draw.config
    unit: tuple[object, ...] = (shard, "sample::int")
    if config.is_by_batch:
        batch = batch_of(draw, shard)
        unit = (batch,) if draw.is_within_parts else (shard, f"{batch}::int")
    bits = random_bits(draw.seed, draw.round_number, *unit)
    key = draw_key(config.score, config.draw_temperature, "bits")
    known, excluded, is_fresh = _known(draw, shard), _excluded(draw, limits, shard), _is_fresh(draw)
    if config.is_by_batch:
        losses = "batch_losses" if draw.is_within_parts else f"({_batch_losses(draw, limits, [shard])})"
        known = f"select * from (select *, {excluded} as excluded from ({known})) left join {losses} on batch = {batch}"
        excluded = "excluded"
    stratum = draw.order.part(_batch_size(draw)) if draw.is_within_parts else f"{shard}"
    log_weight = ""
    if config.weights == "inverse" and config.draw_temperature > 0:
        log_weight = f", {log_weight_of(config.score, config.draw_temperature)} as log_weight"
    return f"""select {shard}::int as shard, sample, source, loss, {stratum} as stratum, {excluded} as excluded,
        {is_fresh} as is_fresh, {key} as key, bits{log_weight}
        from (select *, {bits} as bits from ({known}))"""


def batch_losses_query(draw: Draw, limits: Limits) -> str:
    """Return the SQL of the mean losses of batches that have samples of all shards: batch and batch_loss."""
    return _batch_losses(draw, limits, range(len(draw.num_samples)))


def batch_of(draw: Draw, shard: int) -> str:
    """Return the SQL expression of the number of a sample's batch: within the shard, or, for parts, of the round."""
    size = _batch_size(draw)
    return draw.order.batch(shard, size) if draw.is_within_parts else f"(sample // {size})"


def _batch_size(draw: Draw) -> int:
    """Return the number of consecutive samples that are drawn together."""
    if not draw.config.is_by_batch:
        return 1
    assert draw.config.batch_size is not None, "RefineConfig.resolve fills it in"
    return draw.config.batch_size


def _batch_losses(draw: Draw, limits: Limits, shards: Iterable[int]) -> str:
    """Return the SQL of the mean loss of each batch's candidates, weighted by tokens."""
    is_fresh = _is_fresh(draw)
    rows = " union all ".join(
        f"select {batch_of(draw, shard)} as batch, loss, num_tokens from ({_known(draw, shard)}) "
        f"where {_excluded(draw, limits, shard)} is null and not {is_fresh}"
        for shard in shards
    )
    return (
        f"select batch, sum(loss::double * num_tokens) / sum(num_tokens) as {BATCH_LOSS} from ({rows}) group by batch"
    )


def _known(draw: Draw, shard: int) -> str:
    """Return the SQL of all that is known of a shard's samples."""
    joins = [*_guard_joins(draw, shard), *_policy_joins(draw, shard)]
    if draw.is_within_parts:
        joins.append(draw.order.join(shard))
    return f"select * from {draw.losses(shard)} {' '.join(joins)}"


def is_joined(draw: Draw) -> bool:
    """Return whether the candidates need joins, so that materialising them is cheaper than repeating each scan."""
    config = draw.config
    return (
        bool(config.columns)
        or config.near_duplicates is not None
        or config.max_rounds is not None
        or draw.contaminated is not None
    )


def _excluded(draw: Draw, limits: Limits, shard: int) -> str:
    """Return the SQL expression of the reason why a sample is excluded, or null."""
    config = draw.config
    cases = []
    late = [rule.name for rule in config.sources if rule.from_round > draw.round_number]
    if late:
        cases.append(f"when source in ({_literals(late)}) then '{LATE}'")
    if draw.contaminated is not None:
        cases.append(f"when is_contaminated then '{CONTAMINATED}'")
    if config.min_tokens > 1:
        cases.append(f"when num_tokens < {config.min_tokens} then '{SHORT}'")
    if limits.outlier:
        limit = " ".join(f"when {literal(source)} then {value!r}::double" for source, value in limits.outlier.items())
        cases.append(f"when loss > case source {limit} end then '{OUTLIER}'")
    if config.near_duplicates is not None:
        cases.append(f"when is_duplicate then '{REPEATED}'")
    if config.max_rounds is not None:
        cases.append(f"when num_rounds >= {config.max_rounds} then '{WORN}'")
    if draw.is_within_parts and limits.hardest:
        limit = " ".join(f"when {part} then {value!r}::double" for part, value in limits.hardest.items())
        cases.append(f"when loss > case {draw.order.part()} {limit} end then '{HARDEST}'")
    elif shard in limits.hardest:
        cases.append(f"when loss > {limits.hardest[shard]!r}::double then '{HARDEST}'")
    return f"case {' '.join(cases)} end::varchar" if cases else "null::varchar"


def _is_fresh(draw: Draw) -> str:
    fresh = [rule.name for rule in draw.config.sources if rule.from_round == draw.round_number]
    return f"source in ({_literals(fresh)})" if fresh else "false"


def _literals(values: list[str]) -> str:
    return ", ".join(literal(value) for value in values)


def _guard_joins(draw: Draw, shard: int) -> list[str]:
    config, joins = draw.config, []
    if draw.contaminated is not None:
        joins.append(
            f"left join (select distinct sample, true as is_contaminated from {parquet_rows(draw.contaminated)} "
            f"where shard = {shard}) using (sample)"
        )
    if draw.duplicates is not None:
        joins.append(
            f"left join (select sample, true as is_duplicate from {parquet_rows(draw.duplicates)} "
            f"where shard = {shard}) using (sample)"
        )
    if config.max_rounds is not None:
        mixes = parquet_rows(draw.rounds / str(number) / "mix.parquet" for number in range(1, draw.round_number))
        joins.append(
            f"left join (select sample, count(*) as num_rounds from {mixes} where shard = {shard} "
            "group by sample) using (sample)"
        )
    return joins


def _policy_joins(draw: Draw, shard: int) -> list[str]:
    columns = draw.config.columns
    return [join(draw, shard) for column, join in JOINS.items() if column in columns]
