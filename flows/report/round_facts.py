"""What a scored round says about another one: what it forgot, how far apart losses are, and what a round costs."""

from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
from numpy.typing import NDArray

from flows.run.config import RunConfig
from flows.run.folder import Run

# Losses are counted in steps of this many nats, so that a ledger of any size gives a small table.
_STEP = 0.01


@dataclass(frozen=True)
class Forgotten:
    """What a round forgot of the samples that it trained on, or of a part of them.

    share: of samples whose loss is higher after the round than in the step that trained on them.
    nats: the mean of the loss after the round less that in the step; below 0 if the model got better on average.
    """

    num_samples: int
    share: float
    nats: float


@dataclass(frozen=True)
class Cost:
    """What another round costs, in training tokens; a token that is only scored costs a third of one.

    everything: one pass over the corpus. round: what the next round trains on. scoring: scoring the corpus, 0 for a
    policy without losses. seconds_a_token: the inverse of the training speed; None where the run has not trained.
    """

    everything: int
    round: int
    scoring: int
    seconds_a_token: float | None

    @property
    def total(self) -> int:
        """Return the cost of scoring and the round."""
        return self.round + self.scoring


@dataclass(frozen=True)
class RoundFacts:
    """Figures of the last scored round of a run.

    tokens_per_parameter: predicted tokens of all rounds so far per parameter.
    forgotten: over all samples that the round trained on; None if their losses are not of whole samples.
    parts: the same by equal parts of the training order, from the first.
    spread: standard deviation of losses within a shard (or a part, as refine.within says), nats per token, mean over
    these.
    distance: the share of the samples drawn by loss, with the sampling rate and temperature of `refine`, that a random
    draw of the same size would not have.
    gain: validation loss after the next round less that after the scored one; None if the next is not complete.
    """

    round_number: int
    num_rounds: int
    tokens_per_parameter: float
    forgotten: Forgotten | None
    parts: tuple[Forgotten, ...]
    spread: float
    distance: float
    cost: Cost
    gain: float | None

    def named_figures(self) -> dict[str, Any]:
        """Return the figures by names with units, for other programs."""
        return {
            "round": self.round_number,
            "num_rounds": self.num_rounds,
            "tokens_per_parameter": self.tokens_per_parameter,
            "forgotten": None if self.forgotten is None else _named(self.forgotten),
            "parts": [_named(part) for part in self.parts],
            "spread_nats_per_token": self.spread,
            "distance_share": self.distance,
            "cost": {
                "everything_tokens": self.cost.everything,
                "round_tokens": self.cost.round,
                "scoring_tokens": self.cost.scoring,
                "seconds_per_token": self.cost.seconds_a_token,
            },
            "gain_nats_per_token": self.gain,
        }


def _named(forgotten: Forgotten) -> dict[str, Any]:
    return {
        "num_samples": forgotten.num_samples,
        "share": forgotten.share,
        "nats_per_token": forgotten.nats,
    }


def read_facts(run: Run, ledger: duckdb.DuckDBPyConnection) -> RoundFacts | None:
    """Return the facts of the last round that was scored completely; None if there is none."""
    config = run.config
    scored = [number for number in range(1, config.rounds.num_rounds + 1) if run.recorded("score", number)]
    if not scored:
        return None
    number = scored[-1]
    vocab_size = config.model.vocab_size or int(run.corpus().manifest["vocab_size"])
    [(tokens,)] = ledger.sql(f"select sum(num_tokens) from steps where round <= {number}").fetchall()
    forgotten, parts = _forgotten(ledger, number, config.rounds.num_parts)
    spread, distance = _losses(ledger, number, config)
    return RoundFacts(
        round_number=number,
        num_rounds=config.rounds.num_rounds,
        tokens_per_parameter=(tokens or 0) / config.model.num_parameters(vocab_size),
        forgotten=forgotten,
        parts=parts,
        spread=spread,
        distance=distance,
        cost=_cost(run, ledger, number),
        gain=_gain(ledger, number) if run.recorded("train", number + 1) else None,
    )


def partial_budget(ledger: duckdb.DuckDBPyConnection, number: int) -> str | None:
    """Return the budget by which a round was scored, or None if its losses are of whole samples, as seen losses are."""
    chosen = ledger.sql(f"select candidate from budgets where round = {number} and chosen").fetchall()
    return None if chosen in ([], [("full",)]) else str(chosen[0][0])


def forgetting_parts(number: int, num_parts: int) -> str:
    """Return the SQL query of a round's `forgetting` with `part`, from 0: of `num_parts` equal parts of its order."""
    return f"""select forgetting.*, (place * {num_parts}) // num_samples as part
        from forgetting join (select *, count(*) over () as num_samples from mix where round = {number})
            using (round, shard, sample)
        where forgetting.round = {number}"""


def scoring_cost(ledger: duckdb.DuckDBPyConnection, number: int) -> int:
    """Return the cost of scoring a round, including calibration, in training-token equivalents."""
    rows = ledger.sql(f"select coalesce(scoring_cost, 0) from rounds where round = {number}").fetchall()
    return int(rows[0][0]) if rows else 0


def _forgotten(
    ledger: duckdb.DuckDBPyConnection, number: int, num_parts: int
) -> tuple[Forgotten | None, tuple[Forgotten, ...]]:
    if partial_budget(ledger, number) is not None:
        return None, ()
    rows = ledger.sql(
        f"""select count(*), avg((forgotten > 0)::int), avg(forgotten::double)
        from ({forgetting_parts(number, num_parts)}) group by part order by part"""
    ).fetchall()
    if not rows:
        return None, ()
    parts = tuple(Forgotten(*row) for row in rows)
    total = sum(part.num_samples for part in parts)
    share = sum(part.num_samples * part.share for part in parts) / total
    nats = sum(part.num_samples * part.nats for part in parts) / total
    return Forgotten(total, share, nats), parts


def _losses(ledger: duckdb.DuckDBPyConnection, number: int, config: RunConfig) -> tuple[float, float]:
    """Return the spread of losses within shards, or parts, and how far a draw by loss within these is from a random."""
    grouped = f"select shard as stratum, loss::double as loss from losses where round = {number}"
    if config.refine.within == "part":
        num_parts = config.rounds.num_parts
        # Samples that the round did not train on make one more part, as in the draw.
        grouped = f"""select coalesce((place * {num_parts}) // num_samples, {num_parts}) as stratum,
                loss::double as loss
            from (from losses where round = {number}) left join (
                select shard, sample, place, count(*) over () as num_samples from mix where round = {number})
            using (shard, sample)"""
    [(spread,)] = ledger.sql(
        f"select avg(spread) from (select stddev_pop(loss) as spread from ({grouped}) group by stratum)"
    ).fetchall()
    counted = ledger.sql(
        f"""select stratum, round(loss / {_STEP}) * {_STEP} as loss, count(*) as count
        from ({grouped}) group by all order by all"""
    ).fetchnumpy()
    kept = missed = 0.0
    temperature, rate = draw_of(config)
    bounds = np.flatnonzero(np.diff(counted["stratum"])) + 1
    strata = (np.split(np.asarray(counted[name], float), bounds) for name in ("loss", "count"))
    for losses, counts in zip(*strata, strict=True):
        probabilities = inclusion_probabilities(losses, counts, rate, temperature)
        kept += float(counts @ probabilities)
        missed += float(counts @ np.maximum(probabilities - rate, 0))
    return float(spread), missed / kept


def draw_of(config: RunConfig) -> tuple[float, float]:
    """Return the temperature and the sampling rate of the draw by loss that a run makes, or would make."""
    refine = config.refine
    return 1.0 if refine.temperature is None else refine.temperature, refine.sampling_rate


def inclusion_probabilities(
    losses: NDArray[np.float64], counts: NDArray[np.float64], rate: float, temperature: float
) -> NDArray[np.float64]:
    """Return the probability that a draw by loss keeps a sample, for each of `losses`, of which there are `counts`.

    The threshold of the keys is the one at which the expected number kept is `rate` of all (Gumbel-top-k, Kool et al.
    2019, arXiv 1903.06059). At temperature 0, the highest losses are kept.
    """
    if rate >= 1:
        return np.ones(len(losses))
    if temperature == 0:
        above = counts.sum() - np.cumsum(counts)
        return np.asarray(np.clip((rate * counts.sum() - above) / counts, 0, 1))
    weights = losses / temperature
    low, high = weights.min() - 50, weights.max() + 50

    def probabilities(threshold: float) -> NDArray[np.float64]:
        # Above e^4, the probability is 1 in double precision.
        return np.asarray(-np.expm1(-np.exp(np.minimum(weights - threshold, 4.0))))

    # The expected number falls as the threshold rises; 100 halvings are more than doubles can tell apart.
    for _ in range(100):
        middle = (low + high) / 2
        expected = counts @ probabilities(middle)
        low, high = (middle, high) if expected > rate * counts.sum() else (low, middle)
    return probabilities(low)


def _cost(run: Run, ledger: duckdb.DuckDBPyConnection, number: int) -> Cost:
    [(everything,)] = ledger.sql("select sum(num_tokens) from samples").fetchall()
    [(speed,)] = ledger.sql(f"select median(tokens_per_second) from steps where round = {number}").fetchall()
    refine = run.config.refine
    kept = round(everything * refine.draw_rate)
    return Cost(
        everything=int(everything),
        round=kept if refine.max_tokens is None else min(kept, refine.max_tokens),
        scoring=scoring_cost(ledger, number) if refine.policy_row.needs_losses else 0,
        seconds_a_token=1 / speed if speed else None,
    )


def _gain(ledger: duckdb.DuckDBPyConnection, number: int) -> float | None:
    rows = ledger.sql(
        f"select validation_loss from rounds where round in ({number}, {number + 1}) order by round"
    ).fetchall()
    if len(rows) < 2 or None in (rows[0][0], rows[1][0]):
        return None
    return float(rows[1][0] - rows[0][0])
