"""The corpus: its manifest, and reading samples from its shards."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, NotRequired

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from typing_extensions import TypedDict

from data_scoring.base.checksums import WrittenFile
from data_scoring.base.field_types import Count, PathText
from data_scoring.base.files import allow_open_files, fingerprint
from data_scoring.base.validation import checked_record, read_record
from data_scoring.corpus.indexed import IndexedTokens, open_indexed

FORMAT_VERSION = 1
VALIDATION = -1  # the shard number of the validation set


@dataclass(frozen=True)
class Batch:
    """A batch of samples.

    tokens: [num_samples, seq_length + 1] int64, padded with zeros; num_tokens: [num_samples] int64, the number of
    predicted tokens of each sample: its length as read, minus one; weights: [num_samples] float32, the weights of their
    losses in training, None: 1 each.
    """

    tokens: NDArray[np.int64]
    num_tokens: NDArray[np.int64]
    weights: NDArray[np.float32] | None = None


class _PartSamples(TypedDict):
    name: str
    num_samples: Count


class _Part(TypedDict):
    prefix: PathText
    checksums: dict[str, str]


class _Shard(TypedDict):
    num_samples: Count
    parts: list[_Part]


class _Validation(_Shard):
    sources: list[_PartSamples]


class _Source(TypedDict):
    name: str
    train_tokens: Count
    validation_tokens: NotRequired[Count]  # this and the following, of corpora that are tokenised
    bytes: NotRequired[Count]
    first_byte: NotRequired[Count]  # of corpora used in place
    characters: NotRequired[Count]  # this and the following, of corpora that are tokenised, since version 0.9
    lost_characters: NotRequired[Count]
    lost_examples: NotRequired[str]


class _File(TypedDict):
    bytes: Count
    checksum: str


class Manifest(TypedDict):
    """The manifest of a corpus, its completion record."""

    format_version: int
    stage_fingerprint: str
    seq_length: Annotated[int, Field(ge=1, le=1_048_576)]
    vocab_size: Annotated[int, Field(ge=1, le=2**31)]
    end_of_document: int
    tokenizer: PathText
    sources: list[_Source]
    validation: _Validation
    shards: Annotated[list[_Shard], Field(min_length=1)]
    files: NotRequired[dict[PathText, _File]]
    validation_bytes: NotRequired[dict[str, Count]]  # held-out text by source, of corpora that are tokenised


class _Format(TypedDict):
    format_version: int


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of the corpus in `folder`, or None if it is not complete.

    Raises ValueError if the manifest is damaged, or of another version.
    """
    path = folder / "manifest.json"
    remedy = f"restore it from a copy, or delete {folder} and prepare again"
    found = read_record(path, _Format, remedy)
    if found is None:
        return None
    if found["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format {found['format_version']}, this version reads {FORMAT_VERSION}; prepare the corpus again "
            "in a new run folder"
        )
    return checked_record(found, Manifest, path, remedy)


class Corpus:
    """A prepared corpus, opened read-only.

    Shards are numbered 0..num_shards-1, samples 0..num_samples(shard)-1; both numberings are fixed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = read_manifest(folder)
        if manifest is None:
            raise ValueError(f"{folder}: holds no complete corpus; run `reprise prepare` or `reprise run` first")
        self.manifest = manifest
        # These follow from the rest; manifests of earlier versions lack them.
        later = ("files", "validation_bytes")
        self.fingerprint: str = fingerprint({key: value for key, value in manifest.items() if key not in later})
        self.seq_length: int = manifest["seq_length"]
        self.vocab_size: int = manifest["vocab_size"]
        self.num_shards = len(manifest["shards"])
        self.num_validation_samples: int = manifest["validation"]["num_samples"]
        self._parts: dict[int, list[IndexedTokens]] = {}
        # Each file of a mapped pair takes a descriptor.
        allow_open_files(2 * sum(len(entry["parts"]) for entry in [manifest["validation"], *manifest["shards"]]))

    @property
    def tokenizer_path(self) -> Path:
        """Return the path of the tokenizer file."""
        return self.folder / str(self.manifest["tokenizer"])

    @property
    def samples_path(self) -> Path:
        """Return the Parquet file that lists every sample: shard, sample, source, num_tokens."""
        return self.folder / "samples.parquet"

    @property
    def documents_path(self) -> Path:
        """Return the Parquet file that lists where documents come from; corpora before version 0.12 lack it."""
        return self.folder / "documents.parquet"

    @cached_property
    def validation_sources(self) -> list[str]:
        """Return the source of every validation sample."""
        parts = self.manifest["validation"]["sources"]
        found, listed = len(self.lengths(VALIDATION)), sum(part["num_samples"] for part in parts)
        if found != listed:
            raise ValueError(
                f"{self.folder / 'manifest.json'}: validation.sources: {listed} samples are listed, but there are "
                f"{found}; restore it from a copy, or delete {self.folder} and prepare again"
            )
        return [part["name"] for part in parts for _ in range(part["num_samples"])]

    @property
    def notes(self) -> list[str]:
        """Return notes for the user, in one line each: sources that lost characters, or lack validation or training."""
        held_out = {part["name"] for part in self.manifest["validation"]["sources"] if part["num_samples"]}
        notes = []
        for source in self.manifest["sources"]:
            field = f"corpus.sources.{source['name']}"
            if "lost_characters" in source:
                notes.append(
                    f"{field}: the tokenizer lost {source['lost_characters']:,} of {source['characters']:,} "
                    f"characters, such as {source['lost_examples']!r}"
                )
            if source["name"] not in held_out:
                notes.append(
                    f"{field}: none of its text is held out, so it has no validation loss; give it more documents, or "
                    "raise corpus.validation_fraction"
                )
            elif source["train_tokens"] < 2:
                notes.append(
                    f"{field}: all of its text is held out, so no round trains on it; give it more documents, or lower "
                    "corpus.validation_fraction"
                )
        return notes

    @property
    def held_out_text(self) -> dict[str, tuple[int, int]]:
        """Return the (tokens, bytes) of each source's held-out text; empty without text, or of earlier versions."""
        return {
            source["name"]: (source["validation_tokens"], self.manifest["validation_bytes"][source["name"]])
            for source in self.manifest["sources"]
            if source.get("validation_tokens") and self.manifest.get("validation_bytes", {}).get(source["name"])
        }

    def bits_per_byte(self, source: str, loss: float) -> float | None:
        """Return a validation loss (nats per token) in bits per byte of the source's held-out text.

        It does not depend on how the tokenizer divides the text: tokens / bytes x loss / ln 2 (arXiv 2101.00027,
        "Benchmarking Guidelines"). None if the number of bytes is unknown.
        """
        if source not in self.held_out_text:
            return None
        num_tokens, num_bytes = self.held_out_text[source]
        return num_tokens / num_bytes * loss / math.log(2)

    def num_samples(self, shard: int) -> int:
        """Return the number of samples in a shard or the validation set."""
        return int(self._entry(shard)["num_samples"])

    def lengths(self, shard: int) -> NDArray[np.int32]:
        """Return the number of predicted tokens of each sample of a shard, [num_samples] int32, from the index only."""
        return np.concatenate([part.lengths for part in self.parts(shard)], dtype=np.int32) - np.int32(1)

    def read(self, shards: NDArray[np.integer], samples: NDArray[np.integer], seq_length: int | None = None) -> Batch:
        """Return the samples given by the pairs of `shards` and `samples`, [num_samples] each.

        They are truncated or padded to `seq_length` predicted tokens, by default that of the corpus. Raises ValueError,
        naming the shard, if a token is outside the vocabulary.
        """
        seq_length = seq_length or self.seq_length
        tokens = np.zeros((len(samples), seq_length + 1), np.int64)
        num_tokens = np.empty(len(samples), np.int64)
        for row, (shard, sample) in enumerate(zip(shards.tolist(), samples.tolist(), strict=True)):
            sequence = self._sequence(shard, sample)[: seq_length + 1]
            tokens[row, : len(sequence)] = sequence
            num_tokens[row] = len(sequence) - 1
        if len(tokens) and (tokens.max() >= self.vocab_size or tokens.min() < 0):
            row = int(np.argmax((tokens >= self.vocab_size).any(1) | (tokens < 0).any(1)))
            raise ValueError(
                f"{self._paths(int(shards[row]))[0]}.bin: corrupt: sample {samples[row]} of shard {shards[row]} has "
                f"a token outside the vocabulary of {self.vocab_size}; restore the file or prepare again"
            )
        return Batch(tokens, num_tokens)

    def files(self) -> dict[Path, WrittenFile]:
        """Return the corpus' files, and the source files that it uses in place, as the manifest lists them."""
        return {
            **{
                self.folder / name: WrittenFile(entry["checksum"], entry["bytes"])
                for name, entry in self.manifest.get("files", {}).items()
            },
            **{
                Path(f"{self.folder / part['prefix']}{ending}"): WrittenFile(expected)
                for entry in [self.manifest["validation"], *self.manifest["shards"]]
                for part in entry["parts"]
                for ending, expected in part["checksums"].items()
            },
        }

    def _entry(self, shard: int) -> _Shard:
        entry: _Shard = self.manifest["validation"] if shard == VALIDATION else self.manifest["shards"][shard]
        return entry

    def _paths(self, shard: int) -> list[Path]:
        return [self.folder / part["prefix"] for part in self._entry(shard)["parts"]]

    def parts(self, shard: int) -> list[IndexedTokens]:
        """Return a shard's parts in order, opened; a corpus used in place has one part per source."""
        if shard not in self._parts:
            self._parts[shard] = [open_indexed(path) for path in self._paths(shard)]
        return self._parts[shard]

    def _sequence(self, shard: int, sample: int) -> NDArray[np.integer]:
        for part in self.parts(shard):
            if sample < len(part.lengths):
                return part.sequence(sample)
            sample -= len(part.lengths)
        raise IndexError(f"shard {shard} has no such sample")
