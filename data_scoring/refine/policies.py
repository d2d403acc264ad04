"""The table of policies: what a sample's inclusion is drawn by. A policy is one row, and nothing else names it.

A policy of your own is a row that your code adds: `POLICIES[mine.name] = mine`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from data_scoring.base.names import OneOf
from data_scoring.base.sql import literal
from data_scoring.losses.seen_losses import last_seen
from data_scoring.losses.shard_scoring import losses_path

if TYPE_CHECKING:
    from data_scoring.refine.candidates import Draw

# Columns that a score may use besides those of the losses files: sample, source, num_tokens and loss.
SEEN_LOSS = "seen_loss"  # in the last step that trained on the sample, null if none did
REFERENCE_LOSS = "reference_loss"  # under the model of refine.reference
# Token-weighted mean loss of the batch of refine.batch_size samples. A batch shares its random bits: it is drawn whole.
BATCH_LOSS = "batch_loss"


@dataclass(frozen=True)
class Policy:
    """How losses become inclusion: within each shard, the samples of highest score / temperature + noise are kept."""

    name: str
    description: str  # goes on after the name
    reason: str  # why a sample is kept, as the selection records it
    score: str | None  # SQL expression; None: the configuration's own, refine.sql
    columns: tuple[str, ...] = ()  # what the score uses besides the columns of the losses files
    temperature: float = 1.0  # where refine.temperature is null
    needs_losses: bool = True  # whether the score depends on losses
    drops_hardest: bool = False  # whether refine.drop_hardest applies
    keeps_all: bool = False  # whether refine.sampling_rate does not apply


POLICIES = {
    policy.name: policy
    for policy in (
        Policy("loss", "draws with p proportional to exp(loss / temperature) (the paper)", "drawn by loss", "loss"),
        Policy("loss_batch", "does so batch by batch", "drawn with its batch", BATCH_LOSS, (BATCH_LOSS,)),
        Policy("top", "keeps the hardest", "among the hardest kept", "loss", temperature=0.0),
        Policy(
            "band",
            "keeps the hardest but for the very hardest",
            "in the band",
            "loss",
            temperature=0.0,
            drops_hardest=True,
        ),
        Policy(
            "forgetting",
            "draws by loss less seen loss",
            "drawn by forgetting",
            # What was never trained on has all of its loss to lose.
            "loss - coalesce(seen_loss, 0)",
            (SEEN_LOSS,),
        ),
        Policy(
            "excess",
            "draws by loss less a reference model's",
            "drawn by excess loss",
            "loss - reference_loss",
            (REFERENCE_LOSS,),
        ),
        Policy("random", "draws uniformly", "drawn at random", "0", needs_losses=False),
        Policy("all", "keeps everything", "everything is kept", "0", needs_losses=False, keeps_all=True),
        Policy("sql", "draws by an expression of your own", "drawn by sql", None),
    )
}

# What a configuration takes: the name of a row, the rows added at run time included.
PolicyName = Annotated[str, OneOf(lambda: POLICIES)]


def describe_policies() -> str:
    """Return what the policies do, in a sentence."""
    return "; ".join(f"{policy.name} {policy.description}" for policy in POLICIES.values()) + "."


def _join_seen_loss(draw: "Draw", shard: int) -> str:
    # The latest time it was trained on is what the model may have forgotten since.
    seen = last_seen(draw.rounds, draw.round_number - 1, f"shard = {shard}")
    return f"left join (select sample, loss as {SEEN_LOSS} from {seen}) using (sample)"


def _join_reference_loss(draw: "Draw", shard: int) -> str:
    reference = literal(losses_path(Path(str(draw.config.reference)), shard))
    return f"left join (select sample, loss as {REFERENCE_LOSS} from read_parquet({reference})) using (sample)"


# The SQL that joins a column to a shard's losses. A column of your own is one entry more.
JOINS: dict[str, Callable[["Draw", int], str]] = {
    SEEN_LOSS: _join_seen_loss,
    REFERENCE_LOSS: _join_reference_loss,
}
