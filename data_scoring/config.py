"""What a user may set about the corpus, its tokenizer, scoring and refining."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

# How losses become inclusion; `data_scoring.refine` holds what each means.
Policy = Literal["loss", "random", "all"]


class Config(BaseModel):
    """A frozen configuration section that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


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


class RefineConfig(Config):
    """How losses become the samples of the next round."""

    policy: Policy = Field(
        default="loss",
        description="loss draws with p proportional to exp(loss / temperature) (the paper); random draws uniformly; "
        "all keeps everything.",
    )
    sampling_rate: float = Field(default=0.5, gt=0, le=1, description="Share of each shard that is kept (paper: 0.5).")
    temperature: float = Field(default=1.0, gt=0, le=1e6, description="Softens (>1) or sharpens (<1) the loss draw.")
