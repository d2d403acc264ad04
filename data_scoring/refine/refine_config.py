"""The configuration of refining."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from data_scoring.base.expression import check_expression
from data_scoring.base.field_effects import FREE, Neutral
from data_scoring.base.field_types import Integer, Number, PathText, normalised
from data_scoring.base.user_paths import USER_PATH
from data_scoring.config import Config
from data_scoring.refine.policies import (
    BATCH_LOSS,
    JOINS,
    POLICIES,
    REFERENCE_LOSS,
    Policy,
    PolicyName,
    describe_policies,
)

_LEAST_TEMPERATURE = 1e-6
# The batch_size of earlier versions, which fingerprints hold whatever the policy.
_UNUSED_BATCH_SIZE = 16


def _describe_added_policies(schema: dict[str, Any]) -> None:
    schema["description"] = describe_policies()


class SourceRule(Config):
    """Limits for one source that apply regardless of its losses."""

    name: Annotated[str, AfterValidator(normalised)] = Field(min_length=1, description="Name of the source.")
    at_least: Number = Field(default=0.0, ge=0, le=1, description="Smallest share of its samples that is kept.")
    at_most: Number = Field(default=1.0, ge=0, le=1, description="Largest share of its samples that is kept.")
    from_round: Integer = Field(
        default=1,
        ge=1,
        le=100,
        description="Round in which the source joins; all of its samples are kept in that round.",
    )

    @model_validator(mode="after")
    def _check_shares(self) -> "SourceRule":
        if self.at_least > self.at_most:
            raise ValueError(f"at_least: {self.at_least} is above at_most {self.at_most}; lower it")
        return self


class RefineConfig(Config):
    """How the samples of the next round are selected by their losses."""

    policy: PolicyName = Field(
        default="loss", description=describe_policies(), json_schema_extra=_describe_added_policies
    )
    within: Annotated[Literal["shard", "part"], Neutral("shard", is_in_name=False)] = Field(
        default="shard",
        description="What the draw divides the samples into, to keep the same share of each: shards, which are random, "
        "or parts of the previous round's training order (the paper), of which there are rounds.num_parts. If "
        "rounds.first_order is sources, the default is part.",
    )
    sampling_rate: Number = Field(
        default=0.5, gt=0, le=1, description="Share of each shard, or part, that is kept (paper: 0.5)."
    )
    temperature: Number | None = Field(
        default=None,
        ge=0,
        le=1e6,
        description="Temperature of the draw: above 1 makes it more random, below 1 less; 0 keeps the highest scores. "
        "null: 0 for top and band, else 1 (paper).",
    )
    drop_hardest: Number = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Share of each shard, or part, with the highest losses, which policy band drops.",
    )
    batch_size: Integer | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="Samples per batch, for policy loss_batch; null: the training batch, train.global_batch_size.",
    )
    keep_batches: Annotated[bool, Neutral(False, is_in_name=False)] = Field(
        default=False,
        description="Whether the next round trains on the batches of policy loss_batch as wholes, in random order; "
        "otherwise it shuffles their samples.",
    )
    weights: Annotated[Literal["none", "inverse"], Neutral("none", is_in_name=False)] = Field(
        default="none",
        description="Weights of the kept samples' losses in training: none; inverse: inverse to the probability with "
        "which the draw keeps a sample (Horvitz-Thompson), with a mean of 1 over the round.",
    )
    max_weight: Annotated[Number | None, Neutral(10.0, is_in_name=False)] = Field(
        default=10.0,
        gt=1,
        le=1e6,
        description="Largest weight of a sample, for weights inverse, where the mean is 1; null: no limit.",
    )
    reference: Annotated[PathText | None, USER_PATH] = Field(
        default=None,
        description="Round folder with the reference model's losses of the same corpus, such as runs/large/rounds/1, "
        "for policy excess; it has to exist until the run is done.",
    )
    sql: str | None = Field(
        default=None,
        min_length=1,
        max_length=10_000,
        description="Score for policy sql, nats: an SQL expression of sample, source, num_tokens, loss and seen_loss, "
        "such as 'loss - 0.5 * seen_loss'.",
    )
    outlier_z: Number | None = Field(
        default=6.0,
        gt=0,
        le=1e6,
        description="Robust z-score (median and MAD of the source) above which a loss counts as noise and its sample "
        "is excluded; null excludes none.",
    )
    min_tokens: Integer = Field(default=1, ge=1, description="Scored tokens that a sample needs to be kept.")
    near_duplicates: Number | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Jaccard similarity (of 5-grams of tokens, estimated by MinHash) at or above which a sample is a "
        "near duplicate of an earlier one and excluded, such as 0.8; null excludes none.",
    )
    max_rounds: Integer | None = Field(
        default=None, ge=1, description="Largest number of rounds that train on a sample."
    )
    max_tokens: Integer | None = Field(
        default=None, ge=1,
        description="Largest number of predicted tokens that the round trains on; the mix ends, in training order, "
        "before the sample that would exceed it. null: no limit.",
    )  # fmt: skip
    sources: tuple[SourceRule, ...] = Field(default=(), description="Floors, ceilings and late sources.")
    memory_gb: Annotated[Number, FREE] = Field(
        default=4.0,
        ge=0.25,
        le=4096,
        description="Memory limit of refining on one host, GB, which its processes share; it spills to disk beyond "
        "that.",
    )

    @property
    def policy_row(self) -> Policy:
        """Return the policy's row of `POLICIES`."""
        return POLICIES[self.policy]

    @property
    def score(self) -> str:
        """Return the SQL expression of the score."""
        score = self.policy_row.score
        return f"({self.sql})" if score is None else score

    @property
    def columns(self) -> set[str]:
        """Return the columns that the score uses and the losses files lack."""
        used = self.policy_row.columns if self.policy_row.score is not None else check_expression(str(self.sql))
        return {*used} & {*JOINS, BATCH_LOSS}

    @property
    def draw_temperature(self) -> float:
        """Return the effective temperature."""
        return self.policy_row.temperature if self.temperature is None else self.temperature

    @property
    def draw_rate(self) -> float:
        """Return the effective sampling rate."""
        return 1.0 if self.policy_row.keeps_all else self.sampling_rate

    @property
    def is_by_batch(self) -> bool:
        """Return whether whole batches are drawn."""
        return BATCH_LOSS in self.columns

    def resolve(self, global_batch_size: int) -> "RefineConfig":
        """Return a copy with `batch_size` filled in: that of training, if batches are drawn."""
        if self.batch_size is not None:
            return self
        return self.model_copy(update={"batch_size": global_batch_size if self.is_by_batch else _UNUSED_BATCH_SIZE})

    @model_validator(mode="after")
    def _check_policy(self) -> "RefineConfig":
        if self.policy_row.score is None and self.sql is None:
            raise ValueError(
                f"sql: policy {self.policy} needs an expression; give one, such as 'loss - 0.5 * seen_loss'"
            )
        if self.sql is not None:
            check_expression(self.sql)
        if REFERENCE_LOSS in self.columns and self.reference is None:
            raise ValueError(f"reference: policy {self.policy} needs a reference model's losses; name the round folder")
        if self.policy_row.drops_hardest and self.sampling_rate + self.drop_hardest > 1:
            raise ValueError(
                f"drop_hardest: {self.drop_hardest} and sampling_rate {self.sampling_rate} add up to more than 1; "
                "lower one of them"
            )
        # Scores divided by less than this can be infinite, and the draw would not depend on them.
        if self.temperature is not None and 0 < self.temperature < _LEAST_TEMPERATURE:
            raise ValueError(
                f"temperature: {self.temperature} is below {_LEAST_TEMPERATURE}; raise it, or give 0 to keep the "
                "highest scores"
            )
        names = [rule.name for rule in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"sources: {sorted(names)} names a source twice; merge its entries")
        return self

    @model_validator(mode="after")
    def _check_batches(self) -> "RefineConfig":
        if self.keep_batches and not self.is_by_batch:
            raise ValueError(f"keep_batches: policy {self.policy} draws no batches; set false, or policy loss_batch")
        if self.weights == "inverse" and self.is_by_batch:
            raise ValueError(
                f"weights: policy {self.policy} draws batches, for which inverse is not defined; set none, or another "
                "policy"
            )
        return self
