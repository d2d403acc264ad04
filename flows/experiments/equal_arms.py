"""Arms made equal: how many tokens each trains on in round 2, so that all have the same tokens or the same cost."""

from collections.abc import Mapping
from typing import Any, Literal

from data_scoring.ledger import open_ledger, read_rows
from data_scoring.refine.refine_config import RefineConfig
from flows.experiments.arms import Arm, Comparison
from flows.report import round_facts
from flows.run.config import RunConfig
from flows.run.folder import Run
from flows.stages.refine import preview

# Kept samples are a little shorter or longer than the others.
_MARGIN = 1.02


def equal_cost(config: RunConfig, bases: Mapping[int, Run], comparison: Comparison, wanted: int | None) -> int:
    """Return what all arms have in common for all seeds: `wanted`, or the most that all reach.

    This is the predicted tokens of round 2 or, if the comparison is at equal cost, these and the scoring that an arm
    needs, in training tokens. At equal tokens, the most is what the sampling rate keeps of the smallest corpus, or less
    if an arm selects shorter samples; at equal cost, arms that need no losses may draw from all samples. Raises
    ValueError if an arm reaches less than `wanted`, or if scoring alone costs as much.
    """
    reached: dict[tuple[str, int], int] = {}
    for seed, base in bases.items():
        for arm in comparison.arms:
            refine = _refine(base, arm, comparison.equal)
            spent = _spent(base, refine, comparison.equal)
            reached[arm.name, seed] = preview(base, 2, refine).total.num_tokens_kept + spent
            if wanted is not None and wanted <= spent:
                raise ValueError(
                    f"--tokens: {wanted} is not more than what scoring costs arm {arm.name} for seed {seed}, {spent} "
                    "training tokens; raise it, or set score.budget to a cheaper one"
                )
    (name, seed), least = min(reached.items(), key=lambda item: item[1])
    if wanted is None:
        corpora = [count(base, "select sum(num_tokens) from samples") for base in bases.values()]
        return least if comparison.equal == "cost" else min(least, int(min(corpora) * config.refine.sampling_rate))
    if least < wanted:
        raise ValueError(
            f"--tokens: {wanted} is more than the {least} that arm {name} reaches for seed {seed}; lower it, or raise "
            "refine.sampling_rate"
        )
    return wanted


def limited(base: Run, arm: Arm, equal: Literal["tokens", "cost"], common: int) -> Arm:
    """Return `arm`, limited to the tokens with which it reaches the `common` tokens or cost from the run `base`."""
    refine = _refine(base, arm, equal)
    limits: dict[str, Any] = {"max_tokens": common - _spent(base, refine, equal)}
    if refine.sampling_rate != base.config.refine.sampling_rate:
        limits["sampling_rate"] = refine.sampling_rate
    return Arm(arm.name, arm.folder, {"refine": {**arm.refine, **limits}})


def _refine(base: Run, arm: Arm, equal: str | None) -> RefineConfig:
    """Return an arm's configuration of refining, without a limit on tokens."""
    fields = {**dict(base.config.refine), **arm.refine, "max_tokens": None}
    refine = RefineConfig.model_validate(fields)
    if equal != "cost" or needs_losses(refine):
        return refine
    # What scoring costs other arms, an arm without losses spends on more of the same samples. A random draw leaves some
    # out, or it would be the arm that keeps everything, cut at the same place.
    extra = scoring_cost(base, 1) / count(base, "select sum(num_tokens) from samples")
    rate = min(1.0, _MARGIN * (refine.draw_rate + extra))
    return RefineConfig.model_validate({**fields, "sampling_rate": rate})


def _spent(base: Run, refine: RefineConfig, equal: str | None) -> int:
    """Return what an arm has spent, in training tokens, before it trains round 2, as far as it counts."""
    return scoring_cost(base, 1) if equal == "cost" and needs_losses(refine) else 0


def scoring_cost(run: Run, round_number: int) -> int:
    """Return the cost of scoring a round, including calibration, in training-token equivalents."""
    with open_ledger(run.folder) as ledger:
        return round_facts.scoring_cost(ledger, round_number)


def needs_losses(refine: RefineConfig) -> bool:
    """Return whether the selection depends on losses; keeping everything, or a random part, does not."""
    keeps_all = refine.sampling_rate == 1 and all(rule.at_most == 1 for rule in refine.sources)
    is_blind = keeps_all or not refine.policy_row.needs_losses
    return not is_blind or refine.outlier_z is not None


def count(run: Run, sql: str) -> int:
    """Return the number that `sql` selects from the run's ledger; 0 for null."""
    [(number,)] = read_rows(run.folder, sql)
    return int(number or 0)
