"""The verdict on a run: whether another round that is drawn by loss pays, in words, from what the run has measured.

The thresholds are those of the study in docs/study.md, which also states how often they are wrong there.
"""

from dataclasses import dataclass

from flows.report.round_facts import Cost, RoundFacts, draw_of
from flows.run.config import RunConfig

# A smaller share forgotten counts as nothing forgotten; a draw further from a random one leaves out much of the text.
LEAST_FORGOTTEN, MOST_DISTANCE = 0.05, 0.3


@dataclass(frozen=True)
class Finding:
    """What the study found in runs of a kind: the draw by loss within shards less a random draw of the same total cost.

    mean: over all held-out tokens; worst: over the held-out text of the source with the highest loss; in nats per
    token, means over `num_runs` runs. mean_lower, worst_lower: the runs of these in which the draw by loss is better.
    mean_paid: as mean, but less a random draw of the same number of tokens, as if losses cost nothing.
    """

    num_runs: int
    mean: float
    mean_lower: int
    mean_paid: float
    worst: float
    worst_lower: int


@dataclass(frozen=True)
class Kind:
    """A kind of run: what the study found in it, the first sentence of the verdict, and what to do."""

    finding: Finding
    described: str
    headline: str
    advice: str


_COMPARE = "`reprise compare CONFIG --policies loss,random` measures the difference on your own text and model."
NOTHING_FORGOTTEN = Kind(
    Finding(3, 0.114, 0, 0.0144, -0.0087, 3),
    "in which nothing was forgotten",
    "Scoring does not pay here: the model has forgotten nothing.",
    "Train the next round on a random draw of the same cost (refine: {policy: random, outlier_z: null}), or on "
    f"everything (policy: all). {_COMPARE}",
)
FORGOTTEN = Kind(
    Finding(9, 0.0231, 0, 0.0053, -0.0767, 9),
    "that forgot",
    "Another round pays; drawn by loss, it helps the hardest source, at the expense of the average.",
    "If all text counts the same, draw at random (refine: {policy: random, outlier_z: null}); if hard text counts "
    f"more, go on with policy loss. {_COMPARE}",
)
FAR_FROM_RANDOM = Kind(
    Finding(3, 0.7208, 0, 0.6711, 1.012, 0),
    "in which the draw was as far from random",
    "Do not draw by loss like this: the draw leaves out most of some text, which the next round would forget.",
    "Draw within parts of the training order (refine.within: part), set floors for sources (refine.sources, at_least), "
    f"or draw at random. {_COMPARE}",
)


@dataclass(frozen=True)
class Verdict:
    """A verdict: its first sentence, what it rests on, and what to do; in plain text."""

    headline: str
    reasons: tuple[str, ...]
    advice: str


def judge(facts: RoundFacts | None, config: RunConfig) -> Verdict:
    """Return the verdict on a run with these facts of its last scored round; None: no round was scored."""
    if facts is None:
        return Verdict(
            "No verdict: no round has been scored.",
            (),
            "`reprise score RUN --round N` scores a round that was trained.",
        )
    reasons = (_forgotten(facts), _spread(facts, config), _cost(facts.cost), *_gain(facts))
    kind = kind_of(facts)
    if kind is None:
        advice = "Runs with score.budget: full can tell."
        return Verdict("No verdict: what the model has forgotten is not known.", reasons, advice)
    return Verdict(kind.headline, (*reasons, _study(kind)), kind.advice)


def kind_of(facts: RoundFacts) -> Kind | None:
    """Return the kind of run that has these facts, or None if it cannot be told."""
    if facts.forgotten is None:
        return None
    if facts.distance > MOST_DISTANCE:
        return FAR_FROM_RANDOM
    return FORGOTTEN if facts.forgotten.share >= LEAST_FORGOTTEN else NOTHING_FORGOTTEN


def _forgotten(facts: RoundFacts) -> str:
    forgotten, number = facts.forgotten, facts.round_number
    if forgotten is None:
        return f"Forgotten: not known, since samples were not scored in full after round {number} (score.budget)."
    direction = "rose" if forgotten.nats > 0 else "fell"
    parts = ", ".join(f"{100 * part.share:.0f}" for part in facts.parts)
    return (
        f"Forgotten: after round {number} ({facts.tokens_per_parameter:.1f} tokens per parameter), "
        f"{_percent(forgotten.share)} of the samples have a higher loss than in the step that trained on them; by "
        f"{len(facts.parts)} parts of the training order, {parts} %. On average, a sample's loss {direction} by "
        f"{abs(forgotten.nats):.2f} nats per token."
    )


def _spread(facts: RoundFacts, config: RunConfig) -> str:
    temperature, rate = draw_of(config)
    return (
        f"Spread: within a {config.refine.within}, losses have a standard deviation of {facts.spread:.2f} nats. Of the "
        f"samples that a draw by loss keeps, at sampling rate {rate:g} and temperature {temperature:g}, "
        f"{_percent(facts.distance)} are others than a random draw's."
    )


def _cost(cost: Cost) -> str:
    return (
        f"Cost: another round trains on {_tokens(cost.round, cost)} and scores for {_tokens(cost.scoring, cost)}, "
        f"together {_percent(cost.total / cost.everything)} of a pass over everything. A random draw of the same cost "
        f"trains on {_tokens(cost.total, cost)}."
    )


def _gain(facts: RoundFacts) -> list[str]:
    if facts.gain is None:
        return []
    number = facts.round_number + 1
    return [
        f"Result: round {number} changed the validation loss by {facts.gain:+.3f} nats per token. What a random draw "
        "of the same cost would have changed is not known without a comparison."
    ]


def _study(kind: Kind) -> str:
    found = kind.finding
    return (
        f"Study (docs/study.md): in {found.num_runs} runs {kind.described}, a draw by loss was {_compared(found.mean)} "
        f"than a random draw of the same total cost over all held-out text (better in {found.mean_lower} of the "
        f"{found.num_runs}; were scoring free, {_compared(found.mean_paid)}), and {_compared(found.worst)} on "
        f"the source with the highest loss (better in {found.worst_lower}). Its models are tiny; larger may differ."
    )


def _compared(difference: float) -> str:
    return f"{abs(difference):.3f} nats {'better' if difference < 0 else 'worse'}"


def _tokens(number: int, cost: Cost) -> str:
    text = f"{number / 1e6:,.2f} M tokens"
    return text if cost.seconds_a_token is None else f"{text} ({_duration(number * cost.seconds_a_token)})"


def _duration(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _percent(share: float) -> str:
    return f"{share:.2%}" if 0 < share < 0.01 else f"{share:.0%}"
