"""What a user may set about the corpus, its tokenizer, scoring and refining."""

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_scoring.base.expression import check_expression
from data_scoring.evaluation.tasks import EvaluationName

# How token losses are computed from the model's last hidden states; `kernels.linear_cross_entropy` holds them.
LossKernel = Literal["reference", "chunked", "triton"]
# How losses become inclusion; `data_scoring.refine.candidates` holds what each means.
Policy = Literal["loss", "loss_batch", "top", "band", "forgetting", "excess", "random", "all", "sql"]
# Rows of embedding and head come in multiples of this, alike for every tensor-parallel size that divides it.
VOCABULARY_MULTIPLE = 128


def padded_vocab_size(vocab_size: int) -> int:
    """Return the rows of the embedding of `vocab_size` tokens."""
    return math.ceil(vocab_size / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


class Config(BaseModel):
    """A frozen configuration section that refuses unknown fields."""

    # A field whose name Python keeps for itself is written and read under its alias.
    model_config = ConfigDict(frozen=True, extra="forbid", serialize_by_alias=True)


class SourceConfig(Config):
    """One named source of text."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] = Field(
        description="Name that losses and reports are grouped by."
    )
    path: str = Field(
        min_length=1,
        description="File, glob or folder; for format datasets a hub name or local dataset; for format megatron the "
        "prefix of a .bin/.idx pair; for format python one of topics, docstrings, source.",
    )
    format: Literal["auto", "jsonl", "text", "parquet", "datasets", "megatron", "python"] = Field(
        default="auto", description="How to read the path; auto goes by the file name's ending."
    )
    text_field: str = Field(default="text", min_length=1, description="Field or column that holds a document's text.")
    document: Literal["file", "paragraph", "line"] = Field(
        default="file", description="What one document is, for format text."
    )
    split: str = Field(default="train", min_length=1, description="Split to read, for format datasets.")
    subset: str | None = Field(default=None, description="Configuration of the dataset, for format datasets.")
    max_documents: int | None = Field(default=None, ge=1, description="Read at most this many documents.")


class CorpusConfig(Config):
    """Where the text comes from and how it is cut into shards of samples."""

    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)] = Field(description="Sources of text.")
    seq_length: int = Field(default=256, ge=8, le=1_048_576, description="Tokens that a sample predicts.")
    num_shards: int = Field(default=8, ge=1, le=65_536, description="Equal random parts of the corpus (paper: 8).")
    validation_fraction: float = Field(
        default=0.05, gt=0, lt=1, description="Share of documents held out before the shards are cut."
    )
    on_bad_record: Literal["fail", "skip"] = Field(
        default="fail", description="What to do with a malformed record; skipped ones are listed in rejects.jsonl."
    )


class TokenizerConfig(Config):
    """The tokenizer: a given one, or one trained on the corpus."""

    path: str | None = Field(
        default=None, description="tokenizer.json or SentencePiece .model; null trains a byte-level BPE on the corpus."
    )
    vocab_size: int = Field(default=2048, ge=257, le=1_000_000, description="Entries of a trained tokenizer.")
    train_megabytes: float = Field(
        default=32.0, gt=0, le=4096, description="Text that a tokenizer is trained on, a random sample, in MB."
    )
    end_of_document: str | None = Field(
        default=None, description="Token that ends a document; null looks for the usual ones, such as <|endoftext|>."
    )


def prefix_of(budget: str) -> int | None:
    """Return P, in tokens, of a budget prefix:P, and None of any other."""
    return int(budget.removeprefix("prefix:")) if budget.startswith("prefix:") else None


class ScoreConfig(Config):
    """How samples are scored by their loss."""

    micro_batch_size: int = Field(default=8, ge=1, le=4096, description="Samples a forward pass takes at once.")
    budget: Annotated[str, Field(pattern=r"^(full|seen|auto|prefix:[1-9][0-9]*)$")] = Field(
        default="full",
        description="full scores whole samples; prefix:P their first P tokens; seen takes the losses recorded while "
        "training, without a forward pass; auto tries each on a calibration set and takes the cheapest that will do.",
    )
    min_correlation: float = Field(
        default=0.9,
        ge=-1,
        le=1,
        description="Rank correlation with the full loss that budget auto asks for (Spearman).",
    )
    calibration_samples: int = Field(
        default=300, ge=10, le=10_000_000, description="Samples that budget auto scores in full to choose by."
    )
    loss_kernel: LossKernel = Field(
        default="chunked",
        description="How token losses are computed, in validation too: reference holds all logits; chunked, on any "
        "device, a few megabytes of them; triton, on CUDA, has to be installed.",
    )


class SourceRule(Config):
    """What is due to one source, whatever its losses say."""

    name: str = Field(min_length=1, description="Name of the source.")
    at_least: float = Field(default=0.0, ge=0, le=1, description="Share of its samples that is kept at least.")
    at_most: float = Field(default=1.0, ge=0, le=1, description="Share of its samples that is kept at most.")
    from_round: int = Field(
        default=1, ge=1, le=100, description="Round in which the source joins, all of it: fresh data for a later round."
    )

    @model_validator(mode="after")
    def _check_shares(self) -> "SourceRule":
        if self.at_least > self.at_most:
            raise ValueError(f"at_least: {self.at_least} is above at_most {self.at_most}; lower it")
        return self


class RefineConfig(Config):
    """How losses become the samples of the next round."""

    policy: Policy = Field(
        default="loss",
        description="loss draws with p proportional to exp(loss / temperature) (the paper); loss_batch does so batch "
        "by batch; top keeps the hardest; band the hardest but for the very hardest; forgetting draws by loss less "
        "seen loss; excess by loss less a reference model's; sql by an expression of your own; random draws uniformly; "
        "all keeps everything.",
    )
    sampling_rate: float = Field(default=0.5, gt=0, le=1, description="Share of each shard that is kept (paper: 0.5).")
    temperature: float | None = Field(
        default=None,
        ge=0,
        le=1e6,
        description="Softens (>1) or sharpens (<1) the draw; 0 leaves nothing to chance and keeps the highest. null: 0 "
        "for top and band, else 1 (paper).",
    )
    drop_hardest: float = Field(
        default=0.1, ge=0, lt=1, description="Share of each shard, the hardest, that policy band drops."
    )
    batch_size: int = Field(default=16, ge=1, le=1_000_000, description="Samples a batch, for policy loss_batch.")
    reference: str | None = Field(
        default=None,
        min_length=1,
        description="Round folder with the reference model's losses of the same corpus, such as runs/large/rounds/1, "
        "for policy excess; it has to stay there while the run goes on.",
    )
    sql: str | None = Field(
        default=None,
        min_length=1,
        max_length=10_000,
        description="What policy sql draws by, nats: an expression of sample, source, num_tokens, loss and seen_loss, "
        "such as 'loss - 0.5 * seen_loss'.",
    )
    outlier_z: float | None = Field(
        default=6.0,
        gt=0,
        description="Robust z-score (median and MAD of the source) above which a loss is taken for noise and its "
        "sample quarantined; null keeps all.",
    )
    min_tokens: int = Field(default=1, ge=1, description="Scored tokens that a sample needs to be kept.")
    near_duplicates: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Jaccard similarity (of runs of 5 tokens, estimated by MinHash) from which on a sample "
        "is a near duplicate of an earlier one and left out, such as 0.8; null does not look for them.",
    )
    max_rounds: int | None = Field(default=None, ge=1, description="Rounds that a sample may be trained in at most.")
    max_tokens: int | None = Field(
        default=None, ge=1,
        description="Predicted tokens that the round trains on at most; the mix is cut in its training order before "
        "the sample that would exceed it. null: no limit.",
    )  # fmt: skip
    sources: tuple[SourceRule, ...] = Field(default=(), description="Floors, ceilings and late sources.")
    memory_gb: float = Field(
        default=4.0, ge=0.25, le=4096, description="Memory that refining may take, GB; what exceeds it goes to disk."
    )

    @property
    def draw_temperature(self) -> float:
        """Return the temperature in force."""
        if self.temperature is not None:
            return self.temperature
        return 0.0 if self.policy in ("top", "band") else 1.0

    @model_validator(mode="after")
    def _check_policy(self) -> "RefineConfig":
        if self.policy == "sql" and self.sql is None:
            raise ValueError("sql: policy sql needs an expression; give one, such as 'loss - 0.5 * seen_loss'")
        if self.sql is not None:
            check_expression(self.sql)
        if self.policy == "excess" and self.reference is None:
            raise ValueError("reference: policy excess needs a reference model's losses; name the round folder")
        if self.policy == "band" and self.sampling_rate + self.drop_hardest > 1:
            raise ValueError(
                f"drop_hardest: {self.drop_hardest} and sampling_rate {self.sampling_rate} add up to more than all; "
                "lower one of them"
            )
        names = [rule.name for rule in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"sources: {sorted(names)} names a source twice; say all of it in one entry")
        return self


class EvalConfig(Config):
    """What models are asked after each round and meanwhile, and what becomes of questions in the training text."""

    tasks: tuple[EvaluationName, ...] = Field(
        default=(),
        description="Tasks that every round's model is asked; paper stands for the ten of the paper's table, ablation "
        "for HellaSwag and ARC-Easy. Empty: none.",
    )
    data: str | None = Field(
        default=None,
        min_length=1,
        description="Folder with the tasks' files in their original schemas; null: the data sets' places on the hub.",
    )
    limit: int | None = Field(default=None, ge=1, description="Items of each task or subject, the first; null: all.")
    every_steps: int | None = Field(
        default=None,
        ge=1,
        description="Steps between evaluations, with validation, during training; null: only when a round has ended.",
    )
    training_tasks: tuple[EvaluationName, ...] = Field(
        default=("hellaswag",), description="Tasks that are asked during training and, as eval.tasks, at its end."
    )

    contamination: Literal["off", "report", "remove"] = Field(
        default="off",
        description="Whether the corpus is searched for evaluation items before training: report lists the samples "
        "that hold parts of them, remove leaves these out of every round's mix.",
    )
    contamination_ngram: int = Field(
        default=13,
        ge=5,
        le=50,
        description="Words in a row, or characters of scripts without spaces, that an item and the corpus share where "
        "they overlap (GPT-3: 13).",
    )

    @property
    def asked(self) -> tuple[EvaluationName, ...]:
        """Return the tasks that a round's last model is asked: those that are asked on the way among them."""
        return (*self.tasks, *(self.training_tasks if self.every_steps is not None else ()))

    @property
    def removes(self) -> bool:
        """Return whether samples that hold parts of evaluation items are left out."""
        return self.contamination == "remove"
