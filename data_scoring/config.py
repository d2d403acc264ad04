"""Configuration sections of the corpus, its tokenizer, scoring and evaluation."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from data_scoring.base.field_effects import FREE
from data_scoring.base.field_types import Integer, Name, Number, PathText, Pattern
from data_scoring.base.user_paths import USER_PATH, UserPath
from data_scoring.evaluation.tasks import TaskName

# How token losses are computed from the model's last hidden states; `kernels.linear_cross_entropy` holds them.
LossKernel = Literal["auto", "reference", "chunked", "triton"]
# Rows of embedding and head are padded to a multiple of this, the same for every tensor-parallel size that divides it.
VOCABULARY_MULTIPLE = 128


def padded_vocab_size(vocab_size: int) -> int:
    """Return the number of rows of an embedding of `vocab_size` tokens."""
    return math.ceil(vocab_size / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


class Config(BaseModel):
    """A frozen configuration section that rejects unknown fields."""

    # A field whose name is a Python keyword is written and read under its alias.
    model_config = ConfigDict(frozen=True, extra="forbid", serialize_by_alias=True, allow_inf_nan=False)


def _is_name(fields: Mapping[str, Any], path: Path) -> bool:
    """Return whether a source names a kind of Python text or a data set on the hub, not a path."""
    return fields.get("format") == "python" or (fields.get("format") == "datasets" and not path.exists())


class SourceConfig(Config):
    """One named source of text."""

    name: Name = Field(description="Name that losses and reports are grouped by: letters, digits and _ . -")
    format: Literal["auto", "jsonl", "text", "parquet", "datasets", "megatron", "python"] = Field(
        default="auto", description="How to read the path; auto decides by the file name's suffix."
    )
    path: Annotated[PathText, UserPath(is_name=_is_name)] = Field(
        description="File, folder or, if there is none of that name, glob; folders are read at any depth, links "
        "followed. For format datasets a hub name or local dataset; for format megatron the prefix of a .bin/.idx "
        "pair; for format python one of topics, docstrings, source.",
    )
    text_field: str = Field(default="text", min_length=1, description="Field or column that holds a document's text.")
    document: Literal["file", "paragraph", "line"] = Field(
        default="file", description="What one document is, for format text."
    )
    split: str = Field(default="train", min_length=1, description="Split to read, for format datasets.")
    subset: str | None = Field(default=None, description="Configuration of the dataset, for format datasets.")
    max_documents: Integer | None = Field(default=None, ge=1, description="Read at most this many documents.")


class CorpusConfig(Config):
    """Where the text comes from and how it is cut into shards of samples."""

    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1, max_length=4096)] = Field(
        description="Sources of text."
    )
    seq_length: Integer = Field(default=256, ge=8, le=1_048_576, description="Tokens that a sample predicts.")
    num_shards: Integer = Field(default=8, ge=1, le=65_536, description="Shards: equal random subsets of the corpus.")
    validation_fraction: Number = Field(
        default=0.05, gt=0, lt=1, description="Share of documents held out before the shards are cut."
    )
    on_bad_record: Literal["fail", "skip"] = Field(
        default="fail",
        description="What to do with a malformed record, or a document that the tokenizer cannot encode; skipped ones "
        "are listed in rejects.jsonl.",
    )


class TokenizerConfig(Config):
    """The tokenizer: a given one, or one trained on the corpus."""

    path: Annotated[PathText | None, USER_PATH] = Field(
        default=None,
        description="tokenizer.json or SentencePiece .model; null trains a byte-level BPE on the corpus, whose text "
        "lies compressed in the run folder until it is tokenised.",
    )
    vocab_size: Integer = Field(default=2048, ge=257, le=1_000_000, description="Entries of a trained tokenizer.")
    train_megabytes: Number = Field(
        default=32.0, gt=0, le=4096, description="Text that a tokenizer is trained on, a random sample, in MB."
    )
    end_of_document: str | None = Field(
        default=None, description="Token that ends a document; null looks for the usual ones, such as <|endoftext|>."
    )


def prefix_of(budget: str) -> int | None:
    """Return P, in tokens, for a budget prefix:P, and None for any other."""
    return int(budget.removeprefix("prefix:")) if budget.startswith("prefix:") else None


class ScoreConfig(Config):
    """How samples are scored by their loss."""

    micro_batch_size: Annotated[Integer, FREE] = Field(
        default=8, ge=1, le=4096, description="Samples per forward pass."
    )
    budget: Annotated[
        str, Pattern("full|seen|auto|prefix:[1-9][0-9]{0,6}", "full, seen, auto, or prefix:P with P of 1 to 9999999")
    ] = Field(
        default="full",
        description="full scores whole samples; prefix:P their first P tokens; seen uses the losses recorded during "
        "training, without a forward pass; auto tries each on a calibration set and uses the cheapest that meets "
        "min_correlation.",
    )
    min_correlation: Number = Field(
        default=0.9,
        ge=-1,
        le=1,
        description="Least rank correlation (Spearman) with the full loss that budget auto accepts.",
    )
    calibration_samples: Integer = Field(
        default=300, ge=10, le=10_000_000, description="Samples that budget auto scores in full to compare the budgets."
    )
    loss_kernel: Annotated[LossKernel, FREE] = Field(
        default="auto",
        description="How token losses are computed, in validation too: reference holds all logits; chunked, on any "
        "device, a part of them; triton, on CUDA, has to be installed; auto: triton where it runs, else chunked.",
    )


class EvalConfig(Config):
    """Evaluation after each round and during training, and contamination of the training text."""

    tasks: tuple[TaskName, ...] = Field(
        default=(),
        description="Tasks on which the model of every round is evaluated: names of Reprise's or lm-eval's tasks, or "
        "paths of task files (.yaml) and folders; paper stands for the ten of the paper's table, ablation for the "
        "three of its comparison of inheritance strategies. Empty: none.",
    )
    data: Annotated[PathText | None, USER_PATH] = Field(
        default=None,
        description="Folder with the tasks' files in their original schemas; null: the data sets' places on the hub.",
    )
    limit: Integer | None = Field(
        default=None, ge=1, description="Evaluate only the first N items of each task or subject; null: all."
    )
    every_steps: Integer | None = Field(
        default=None,
        ge=1,
        description="Steps between evaluations, with validation, during training; null: only when a round has ended.",
    )
    training_tasks: tuple[TaskName, ...] = Field(
        default=("hellaswag",), description="Tasks of in-training evaluation, also evaluated at the end of the round."
    )

    contamination: Literal["off", "report", "remove"] = Field(
        default="off",
        description="Whether the corpus is searched for evaluation items before training: report lists the samples "
        "that hold parts of them, remove leaves these out of every round's mix.",
    )
    contamination_ngram: Integer = Field(
        default=13,
        ge=5,
        le=50,
        description="Length of an n-gram in words, or characters in scripts without spaces; an item overlaps with the "
        "corpus if they share one (GPT-3: 13).",
    )

    @property
    def asked(self) -> tuple[TaskName, ...]:
        """Return the tasks of the evaluation at the end of a round, including those of in-training evaluation."""
        return (*self.tasks, *(self.training_tasks if self.every_steps is not None else ()))

    @property
    def removes(self) -> bool:
        """Return whether samples that contain parts of evaluation items are left out."""
        return self.contamination == "remove"
