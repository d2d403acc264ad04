"""The table of policies, which decide the scores that samples are selected by. Each policy is defined by its row alone.

To add a policy, add a row: `POLICIES[mine.name] = mine`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from data_scoring.base.engine import Count, Part, Result, Work
from data_scoring.base.names import OneOf
from data_scoring.base.sql import parquet_rows
from data_scoring.losses.seen_losses import last_seen
from data_scoring.losses.shard_scoring import losses_path

if TYPE_CHECKING:
    from data_scoring.refine.candidates import Draw

# Columns that a score may use besides those of the losses files: sample, source, num_tokens and loss.
SEEN_LOSS = "seen_loss"  # in the last step that trained on the sample, null if none did
REFERENCE_LOSS = "reference_loss"  # under the model of refine.reference
# Token-weighted mean loss of a batch of refine.batch_size samples, which share random bits and are drawn together.
BATCH_LOSS = "batch_loss"


@dataclass(frozen=True)
class Policy:
    """A selection rule: within each shard, the samples with the highest score / temperature + noise are kept."""

    name: str
    description: str  # continues a sentence that starts with the name
    reason: str  # why a sample is kept, as the selection records it
    score: str | None  # SQL expression; None: the configuration's own, refine.sql
    columns: tuple[str, ...] = ()  # columns that the score uses besides those of the losses files
    temperature: float = 1.0  # used if refine.temperature is null
    needs_losses: bool = True  # whether the score depends on losses
    drops_hardest: bool = False  # whether refine.drop_hardest applies
    keeps_all: bool = False  # whether refine.sampling_rate does not apply


POLICIES = {
    policy.name: policy
    for policy in (
        Policy("loss", "draws with p proportional to exp(loss / temperature) (the paper)", "drawn by loss", "loss"),
        Policy("loss_batch", "draws whole batches in that way", "drawn with its batch", BATCH_LOSS, (BATCH_LOSS,)),
        Policy("top", "keeps the highest losses", "among the hardest kept", "loss", temperature=0.0),
        Policy(
            "band",
            "keeps the highest losses except for the very highest",
            "in the band",
            "loss",
            temperature=0.0,
            drops_hardest=True,
        ),
        Policy(
            "forgetting",
            "draws by loss minus seen loss",
            "drawn by forgetting",
            # Samples that were never trained on count with their whole loss.
            "loss - coalesce(seen_loss, 0)",
            (SEEN_LOSS,),
        ),
        Policy(
            "excess",
            "draws by loss minus a reference model's loss",
            "drawn by excess loss",
            "loss - reference_loss",
            (REFERENCE_LOSS,),
        ),
        Policy("random", "draws uniformly", "drawn at random", "0", needs_losses=False),
        Policy("all", "keeps everything", "everything is kept", "0", needs_losses=False, keeps_all=True),
        Policy("sql", "draws by the expression refine.sql", "drawn by sql", None),
    )
}

# The values of the configuration field: the names of all rows, including those added at run time.
PolicyName = Annotated[str, OneOf(lambda: POLICIES)]


def keeping_policies(work: Work[Part, Result]) -> Work[Part, Result]:
    """Return `work` that finds the policies and columns of this process wherever it runs, those added here, too."""
    return partial(_with_policies, {**POLICIES}, {**JOINS}, work)


def _with_policies(
    policies: dict[str, Policy],
    joins: dict[str, Callable[["Draw", int], str]],
    work: Work[Part, Result],
    part: Part,
    count: Count,
) -> Result:
    if (policies, joins) != (POLICIES, JOINS):
        # A worker may know others from work that it did before.
        POLICIES.clear()
        POLICIES.update(policies)
        JOINS.clear()
        JOINS.update(joins)
    return work(part, count)


def describe_policies() -> str:
    """Return a sentence that describes all policies."""
    return "; ".join(f"{policy.name} {policy.description}" for policy in POLICIES.values()) + "."


def _join_seen_loss(draw: "Draw", shard: int) -> str:
    # Use the latest seen loss: the model may have forgotten the sample since then.
    seen = last_seen(draw.rounds, draw.round_number - 1, f"shard = {shard}")
    return f"left join (select sample, loss as {SEEN_LOSS} from {seen}) using (sample)"


def _join_reference_loss(draw: "Draw", shard: int) -> str:
    reference = parquet_rows(losses_path(Path(str(draw.config.reference)), shard))
    return f"left join (select sample, loss as {REFERENCE_LOSS} from {reference}) using (sample)"


# The SQL that joins each column to a shard's losses. To add a column, add an entry.
JOINS: dict[str, Callable[["Draw", int], str]] = {
    SEEN_LOSS: _join_seen_loss,
    REFERENCE_LOSS: _join_reference_loss,
}
