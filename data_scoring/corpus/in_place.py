"""An existing Megatron corpus used in place: each shard is a new index file over its `.bin` files."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from data_scoring.base.engine import Count
from data_scoring.base.files import checksum, writing
from data_scoring.config import SourceConfig
from data_scoring.corpus.documents import Rows, name_of_file
from data_scoring.corpus.indexed import IndexedTokens, write_index
from data_scoring.corpus.packing import ShardAssignment, Stream
from data_scoring.corpus.sources import open_megatron

_CHUNK_DOCUMENTS = 1 << 14

_Described = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True)
class InPlaceSource:
    """The tokens of a source, in the order of its index, as one stretch of the file `tokens_path`.

    first_byte: where the stretch starts; checksum: that of the file.
    """

    name: str
    tokens_path: Path
    dtype: np.dtype
    first_byte: int
    num_tokens: int
    checksum: str

    def entry(self) -> dict[str, Any]:
        """Return the source's entry in the manifest."""
        return {"name": self.name, "train_tokens": self.num_tokens, "first_byte": self.first_byte}


def open_in_place(source: SourceConfig, count: Count, *, vocab_size: int, folder: Path) -> InPlaceSource:
    """Return a source in Megatron's format, whose tokens are its sequences, concatenated in the index's order.

    They stay where they are if they follow each other in the `.bin`. Otherwise, as windows over them would not be
    contiguous, they are copied to `folder`. Raises ValueError if there are none, or if one is outside the vocabulary.
    """
    name, indexed = source.name, open_megatron(source)
    stretches = list(islice(indexed.stretches(), 2))
    if not stretches:
        raise ValueError(f"corpus.sources.{name}.path: {indexed.prefix}.idx lists no tokens; remove the source")
    if len(stretches) == 1:
        path, first_byte = Path(f"{indexed.prefix}.bin").resolve(), stretches[0][0]
        digest = _read_all(name, indexed, vocab_size, None, count)
        if path.stat().st_size != indexed.num_tokens * indexed.dtype.itemsize:
            digest = checksum(path)
    else:
        path, first_byte = folder / f"tokens-{name}.bin", 0
        with writing(path) as temporary, temporary.open("wb") as file:
            digest = _read_all(name, indexed, vocab_size, file, count)
    return InPlaceSource(name, path, indexed.dtype, first_byte, indexed.num_tokens, digest)


def _read_all(name: str, indexed: IndexedTokens, vocab_size: int, copy: IO[bytes] | None, count: Count) -> str:
    """Check every token, write it to `copy` if there is one, and return the checksum of all."""
    digest, done = hashlib.blake2b(digest_size=16), 0
    for block in indexed.blocks():
        smallest, largest = int(block.min()), int(block.max())
        if smallest < 0 or largest >= vocab_size:
            raise ValueError(
                f"{indexed.prefix}.bin: source {name} has token {smallest if smallest < 0 else largest}, but "
                f"tokenizer.path has only {vocab_size} tokens; give the tokenizer that tokenised it"
            )
        digest.update(block.data)
        if copy is not None:
            copy.write(block.data)
        done += len(block)
        count(done)
    return digest.hexdigest()


def locate_in_place(indexed: IndexedTokens) -> Iterator[Rows]:
    """Yield where the documents of a source come from, in order, without empty ones, in chunks of bounded size."""
    file, start = name_of_file(f"{indexed.prefix}.bin"), 0
    for first in range(0, len(indexed.documents) - 1, _CHUNK_DOCUMENTS):
        bounds = indexed.documents[first : first + _CHUNK_DOCUMENTS + 1]
        lengths = indexed.lengths[bounds[0] : bounds[-1]]
        places = start + np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[bounds - bounds[0]]
        chosen = np.flatnonzero(np.diff(places))
        yield Rows([file] * len(chosen), first + chosen + 1, places[chosen])
        start = int(places[-1])


def assign_in_place(
    sources: list[InPlaceSource], sample_length: int, validation_fraction: float, num_shards: int, seed: int
) -> ShardAssignment:
    """Return the assignment of samples, windows of `sample_length` tokens over each source.

    Windows rather than documents are held out, and duplicates stay: dropping a document would mean copying the tokens.
    """
    streams = [Stream(source.name, source.num_tokens, sample_length) for source in sources]
    total = sum(stream.num_samples for stream in streams)
    return ShardAssignment(streams, num_shards, seed, max(1, round(total * validation_fraction)))


def index_shard(
    shard: int | None,
    count: Count,
    *,
    assignment: ShardAssignment,
    in_place: Sequence[InPlaceSource],
    folder: Path,
) -> dict[str, Any]:
    """Return the manifest entry of a shard, or of the validation set (None), after writing an index for each source."""
    if shard is None:
        return _index_parts("validation", assignment.held_out, assignment, in_place, folder)
    entry = _index_parts(f"shard-{shard:04d}", partial(assignment.samples, shard), assignment, in_place, folder)
    count(entry["num_samples"])
    return {"num_samples": entry["num_samples"], "parts": entry["parts"]}


def _index_parts(
    name: str,
    describe: Callable[[], Iterator[_Described]],
    assignment: ShardAssignment,
    in_place: Sequence[InPlaceSource],
    folder: Path,
) -> dict[str, Any]:
    parts, sources = [], []
    for number, (stream, tokens) in enumerate(zip(assignment.streams, in_place, strict=True)):
        count = sum(int((source == number).sum()) for source, _, _ in describe())

        def chunks(
            number: int = number,
            first: int = tokens.first_byte,
            stride: int = stream.sample_length * tokens.dtype.itemsize,
        ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
            for source, within, lengths in describe():
                yield lengths[source == number], first + within[source == number] * stride

        prefix = f"{name}-{stream.name}"
        with writing(folder / f"{prefix}.idx") as temporary:
            write_index(temporary, tokens.dtype, count, chunks())
        with writing(folder / f"{prefix}.bin") as temporary:
            # A copy is beside its shards, wherever the folder is moved.
            is_copy = tokens.tokens_path.parent == folder
            temporary.symlink_to(tokens.tokens_path.name if is_copy else tokens.tokens_path)
        checksums = {".idx": checksum(folder / f"{prefix}.idx")}
        if name == "validation":
            # All shards share the file of tokens, which is verified once.
            checksums[".bin"] = tokens.checksum
        parts.append({"prefix": prefix, "checksums": checksums})
        sources.append({"name": stream.name, "num_samples": count})
    return {"num_samples": sum(part["num_samples"] for part in sources), "sources": sources, "parts": parts}
