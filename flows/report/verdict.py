"""The verdict on a run: whether another round that is drawn by loss pays, in words, from what the run has measured.

The thresholds are those of the study in docs/study.md, which also states how often they are wrong there.
"""

from dataclasses import dataclass

from flows.report.round_facts import Cost, RoundFacts, draw_of
from flows.run.config import RunConfig

# What the study measured, with some room: between these, runs are of no kind.
LITTLE_FORGOTTEN, MUCH_FORGOTTEN = 0.01, 0.1
NEAR_RANDOM, FAR_FROM_RANDOM = 0.18, 0.4
# The study drew after round 1 at this rate.
_STUDIED_RATE = 0.5


@dataclass(frozen=True)
class Finding:
    """What the study found in runs of a kind: a draw by loss less a random draw of the same total cost.

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


_AT_RANDOM = "draw at random: refine: {{policy: random, sampling_rate: {rate:.2g}, outlier_z: null}}, at the same cost."
_COMPARE = (
    "`reprise compare CONFIG --policies loss,random --equal cost` measures the difference on your own text and model."
)
NOTHING_FORGOTTEN = Kind(
    Finding(3, 0.114, 0, 0.0144, -0.0087, 3),
    "that had forgotten next to nothing",
    "Drawing by loss does not pay here: the model has forgotten next to nothing.",
    f"Train on everything (refine.policy: all), or {_AT_RANDOM}",
)
FORGOTTEN = Kind(
    Finding(9, 0.0231, 0, 0.0053, -0.0767, 9),
    "that had forgotten as much",
    "Drawing by loss helps the hardest source here, at the expense of the average.",
    f"If hard text counts more, go on with policy loss; if all text counts the same, {_AT_RANDOM}",
)
LEFT_OUT = Kind(
    Finding(3, 0.7208, 0, 0.6711, 1.012, 0),
    "in which the draw was as far from random",
    "Do not draw by loss like this: the draw leaves out most of some text, which the next round forgets.",
    f"Draw within parts of the training order (refine.within: part), which is safe, or {_AT_RANDOM}",
)
IN_PARTS = Kind(
    Finding(3, 0.0733, 0, 0.0236, 0.0597, 0),
    "that had forgotten most of what they read first, and drew within parts",
    "Drawing by loss does not pay here: the model has forgotten what it read first, and a random draw brings it back.",
    f"Instead, {_AT_RANDOM}",
)


@dataclass(frozen=True)
class Verdict:
    """A verdict: its first sentence, what it rests on, and what to do; in plain text."""

    headline: str
    reasons: tuple[str, ...]
    advice: str

    @property
    def text(self) -> str:
        """Return all of it, one line each."""
        return "\n".join([self.headline, *(f"- {reason}" for reason in self.reasons), self.advice])


def judge(facts: RoundFacts | None, config: RunConfig) -> Verdict:
    """Return the verdict on a run with these facts of its last scored round; None: no round was scored."""
    refine = config.refine
    if facts is None:
        if not refine.policy_row.needs_losses and refine.outlier_z is None:
            return Verdict(f"Policy {refine.policy} needs no losses, so no round was scored.", (), _COMPARE)
        advice = "`reprise score RUN --round N` scores a round that was trained."
        return Verdict("No verdict yet: no round has been scored.", (), advice)
    reasons = (*_gain(facts), _forgotten(facts), _spread(facts, config), _cost(facts.cost))
    if refine.policy != "loss" or refine.sources or refine.draw_rate == 1:
        how = "with limits of sources" if refine.sources else f"at sampling rate {refine.draw_rate:g}"
        headline = f"No verdict: the study's is about drawing by loss, and this run has policy {refine.policy} {how}."
        return Verdict(headline, reasons, _COMPARE)
    if facts.forgotten is None:
        return Verdict(
            "No verdict: what the model has forgotten is not known.", reasons, "Runs with score.budget: full can tell."
        )
    kind = kind_of(facts, refine.within)
    if kind is None:
        return Verdict("No verdict: this run is between the kinds that the study measured.", reasons, _COMPARE)
    advice = kind.advice.format(rate=min(1.0, facts.cost.total / facts.cost.everything))
    return Verdict(kind.headline, (*reasons, _study(kind, facts, refine.sampling_rate)), f"{advice} {_COMPARE}")


def kind_of(facts: RoundFacts, within: str) -> Kind | None:
    """Return the kind of a run that draws by loss and has these facts, or None if the study measured no such run."""
    forgotten, is_near = facts.forgotten, facts.distance <= NEAR_RANDOM
    if forgotten is None:
        return None
    if facts.distance >= FAR_FROM_RANDOM:
        return LEFT_OUT
    # On average, samples got worse: early text was forgotten.
    if forgotten.nats > 0:
        return IN_PARTS if within == "part" else None
    if is_near and forgotten.share <= LITTLE_FORGOTTEN:
        return NOTHING_FORGOTTEN
    return FORGOTTEN if is_near and forgotten.share >= MUCH_FORGOTTEN else None


def _forgotten(facts: RoundFacts) -> str:
    forgotten, number = facts.forgotten, facts.round_number
    if forgotten is None:
        return f"Forgotten: not known, since samples were not scored in full after round {number} (score.budget)."
    direction = "rose" if forgotten.nats > 0 else "fell"
    parts = ", ".join(f"{100 * part.share:.0f}" for part in facts.parts)
    return (
        f"Forgotten: after round {number} ({facts.tokens_per_parameter:.1f} tokens per parameter), "
        f"{_percent(forgotten.share)} of the samples that it trained on have a higher loss than in the step that "
        f"trained on them, before its update; by {len(facts.parts)} parts of the training order, {parts} %. On "
        f"average, a sample's loss {direction} by {abs(forgotten.nats):.2f} nats per token."
    )


def _spread(facts: RoundFacts, config: RunConfig) -> str:
    temperature, rate = draw_of(config)
    return (
        f"Spread: within a {config.refine.within}, losses have a standard deviation of {facts.spread:.2f} nats. Of the "
        f"samples that a draw by loss keeps, at sampling rate {rate:g} and temperature {temperature:g}, "
        f"{_percent(facts.distance)} would not be in a random draw of the same size."
    )


def _cost(cost: Cost) -> str:
    text = f"Cost: another round trains on {_tokens(cost.round, cost)}"
    if not cost.scoring:
        return f"{text}, {_percent(cost.round / cost.everything)} of a pass over everything."
    return (
        f"{text}, and scoring costs as much as {_tokens(cost.scoring, cost)}, together "
        f"{_percent(cost.total / cost.everything)} of a pass over everything, for which it could train on "
        f"{_tokens(min(cost.total, cost.everything), cost)} drawn at random."
    )


def _gain(facts: RoundFacts) -> list[str]:
    if facts.gain is None:
        return []
    number = facts.round_number + 1
    return [
        f"Result: round {number} {'raised' if facts.gain > 0 else 'lowered'} the validation loss by "
        f"{abs(facts.gain):.3f} nats per token. What a random draw of the same cost would have done is not known "
        "without a comparison."
    ]


def _study(kind: Kind, facts: RoundFacts, rate: float) -> str:
    found = kind.finding
    text = (
        f"Study (docs/study.md): in {found.num_runs} runs {kind.described}, a draw by loss was {_compared(found.mean)} "
        f"than a random draw of the same total cost over all held-out text (better in {found.mean_lower} of the "
        f"{found.num_runs}; at equal training tokens, {_compared(found.mean_paid)}), and {_compared(found.worst)} on "
        f"the source with the highest loss (better in {found.worst_lower}). Equal draws differ by up to 0.03 nats. Its "
        "models are tiny; larger may differ."
    )
    if facts.round_number > 1 or rate != _STUDIED_RATE:
        text += f" It drew after round 1, at sampling rate {_STUDIED_RATE:g}."
    return text


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
