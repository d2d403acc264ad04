"""Exact selection from the candidates of a stratum, a shard or a part of the training order, in bounded memory.

Two scans find what is needed to be kept (`bars`); a third writes every sample's result. DuckDB spills to disk.
"""

from typing import TYPE_CHECKING

from data_scoring.base.sql import literal
from data_scoring.refine.bars import Bar, Buckets, find_bar, naming_policy
from data_scoring.refine.candidates import (
    EXCLUSIONS,
    Draw,
    Limits,
    candidates_query,
    check_losses,
    is_joined,
)
from data_scoring.refine.part_bars import PartBars, view_batch_losses
from data_scoring.refine.policies import POLICIES
from data_scoring.refine.refine_config import RefineConfig

if TYPE_CHECKING:
    import duckdb

FRESH = "its source joins now"
FLOOR, CEILING, NOT_DRAWN = "floor of its source", "ceiling of its source", "not drawn"


class Selection:
    """The selection of a round's samples: its queries need a table on `connection` whose name begins with `name`.

    bars: those that `find_part_bars` returns. Raises ValueError in `query` if losses are missing or incomplete, a score
    is not finite, or floors exceed the sampling rate.
    """

    def __init__(
        self,
        connection: "duckdb.DuckDBPyConnection",
        draw: Draw,
        limits: Limits,
        bars: PartBars | None,
        name: str = "chosen",
    ) -> None:
        assert (bars is not None) == draw.is_within_parts
        self._connection, self._draw, self._limits, self._bars = connection, draw, limits, bars
        self._table = f"{name}_candidates"
        # Otherwise, a shard of few samples may be what joins look up in, and rows come in the order of the threads.
        connection.execute("set disabled_optimizers = 'join_order,build_side_probe_side'")
        connection.execute(f"create type if not exists reason as {_reason_type()}")
        if bars is not None:
            view_batch_losses(connection, bars.batch_losses)

    def query(self, shard: int) -> str:
        """Return the SQL of a shard's selection, rows (shard, sample, loss, kept, reason) in the order of the losses.

        With weights, also probability, with which the draw keeps a kept sample, float, null for others.
        """
        check_losses(self._draw, shard)
        with naming_policy(self._draw.config):
            relation = f"({candidates_query(self._draw, self._limits, shard)})"
            if self._bars is not None:
                bucketed = self._bars.buckets.label(relation, self._draw.config)
                return _selection(self._draw.config, self._bars.bars, bucketed)
            if is_joined(self._draw):
                relation = self._materialise(relation)
            buckets = Buckets.of(self._connection, relation)
            bucketed = buckets.label(relation, self._draw.config)
            bars = {shard: find_bar(self._connection, self._draw.config, bucketed)}
            return _selection(self._draw.config, bars, bucketed)

    def _materialise(self, relation: str) -> str:
        self._connection.execute(f"create or replace temp table {self._table} as from {relation}")
        return self._table


def _reason_type() -> str:
    """Return the SQL type of reasons: an enumeration, which is several times faster to write than strings."""
    drawn = (policy.reason for policy in POLICIES.values())
    reasons = dict.fromkeys([*drawn, *EXCLUSIONS, FRESH, FLOOR, CEILING, NOT_DRAWN])
    return f"enum ({', '.join(map(literal, reasons))})"


def _by_stratum(bars: dict[int, Bar], part: str) -> str:
    """Return the SQL expression with the entry `part` of the bar of a candidate's stratum."""
    values: dict[int, str] = {stratum: getattr(bar, part) for stratum, bar in bars.items()}
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    return f"case stratum {' '.join(f'when {stratum} then {value}' for stratum, value in values.items())} end"


def _selection(config: RefineConfig, bars: dict[int, Bar], bucketed: str) -> str:
    kept, wins = (_by_stratum(bars, part) for part in ("kept", "wins"))
    reason = literal(config.policy_row.reason)
    reasons = f"when is_within then {reason}::reason else '{NOT_DRAWN}'::reason"
    if any(bar.is_ruled for bar in bars.values()):
        reasons = (
            f"when is_within then case when {wins} then {reason}::reason else '{FLOOR}'::reason end "
            f"when {wins} then '{CEILING}'::reason else '{NOT_DRAWN}'::reason"
        )
    probability = ""
    if config.weights == "inverse":
        drawn = f"when excluded is null and is_within then {_by_stratum(bars, 'probability')}"
        probability = f", (case when excluded is null and is_fresh then 1.0::double {drawn} end)::float as probability"
    return f"""
        select shard, sample, loss, excluded is null and (is_fresh or is_within) as kept,
            case when excluded is not null then excluded::reason when is_fresh then '{FRESH}'::reason {reasons} end
                as reason{probability}
        from (select *, {kept} as is_within from {bucketed})"""
