"""The corpus in reading order: the tokens of each source in document order, read from the shards.

Samples are at random places in the shards. The places follow from the corpus's seed, so the order needs no list.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from data_scoring.corpus.corpus import Corpus
from data_scoring.corpus.packing import ShardAssignment, Stream

_CHUNK_TOKENS = 1 << 20


class ReadingOrder:
    """The training text of a corpus that was prepared with `seed`, by source, in reading order.

    A source's samples are numbered in reading order.
    """

    def __init__(self, corpus: Corpus, seed: int) -> None:
        self.corpus, self.seed = corpus, seed
        self.sample_length = corpus.seq_length + 1
        self.sources: list[str] = [source["name"] for source in corpus.manifest["sources"]]
        streams = [
            Stream(source["name"], source["train_tokens"], self.sample_length) for source in corpus.manifest["sources"]
        ]
        num_samples = sum(stream.num_samples for stream in streams)
        # A corpus used in place holds out samples; others hold out whole documents.
        num_held_out = num_samples - sum(corpus.num_samples(shard) for shard in range(corpus.num_shards))
        self.is_in_place = num_held_out > 0
        self._assignment = ShardAssignment(streams, corpus.num_shards, seed, num_held_out)

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens of all sources, including the held-out ones of a corpus used in place."""
        return sum(stream.num_tokens for stream in self._assignment.streams)

    def num_source_tokens(self, source: int) -> int:
        """Return the number of tokens of source number `source`."""
        return self._assignment.streams[source].num_tokens

    def blocks(self, source: int, place: int = 0) -> Iterator[NDArray[np.integer]]:
        """Yield the tokens of source number `source` from `place` on, in order, in blocks of bounded size.

        Raises ValueError if a token is outside the vocabulary.
        """
        if self.is_in_place:
            yield from self._blocks_in_place(source, place)
            return
        count = self._assignment.streams[source].num_samples
        step = max(1, _CHUNK_TOKENS // self.sample_length)
        first, before = divmod(place, self.sample_length)
        for start in range(first, count, step):
            batch = self.corpus.read(*self._place(source, np.arange(start, min(start + step, count), dtype=np.int64)))
            # Only a source's last sample may be shorter than the others.
            yield batch.tokens.reshape(-1)[before : int((batch.num_tokens + 1).sum())]
            before = 0

    def _blocks_in_place(self, source: int, place: int) -> Iterator[NDArray[np.integer]]:
        # Every part of a source is an index over the file of all its tokens.
        part = self.corpus.parts(0)[source]
        num_tokens, itemsize = self._assignment.streams[source].num_tokens, part.dtype.itemsize
        for start in range(place, num_tokens, _CHUNK_TOKENS):
            count = min(_CHUNK_TOKENS, num_tokens - start)
            tokens = part.read(self._first_byte(source) + start * itemsize, count)
            if tokens.max() >= self.corpus.vocab_size or tokens.min() < 0:
                raise ValueError(
                    f"{part.prefix}.bin: has a token outside the vocabulary of {self.corpus.vocab_size}; give the "
                    "tokenizer that it was tokenised with"
                )
            yield tokens

    def _first_byte(self, source: int) -> int:
        # Corpora used in place that version 0.8 made start at the first byte.
        return self.corpus.manifest["sources"][source].get("first_byte", 0)

    def find(
        self, shards: NDArray[np.integer], samples: NDArray[np.integer]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the source numbers of training samples, and the places of their first tokens in the source's text.

        [n] int64 each: the inverse of `locate`.
        """
        if not self.is_in_place:
            positions = samples.astype(np.int64) * self.corpus.num_shards + shards
            sources, numbers, _ = self._assignment.describe(positions)
            return sources, numbers * self.sample_length
        sources, starts = np.empty(len(samples), np.int64), np.empty(len(samples), np.int64)
        for row, (shard, sample) in enumerate(zip(shards.tolist(), samples.tolist(), strict=True)):
            parts = self.corpus.parts(shard)
            ends = np.cumsum([len(part.lengths) for part in parts])
            source = int(np.searchsorted(ends, sample, side="right"))
            part = parts[source]
            pointer = int(part.pointers[sample - ends[source] + len(part.lengths)])
            sources[row], starts[row] = source, (pointer - self._first_byte(source)) // part.dtype.itemsize
        return sources, starts

    def locate(self, source: int, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the shard of each of a source's samples and its number there, [n] int64 each; -1 for held-out ones."""
        shards, places = self._place(source, samples)
        is_held_out = places < 0
        shards[is_held_out] = -1
        if not self.is_in_place:
            return shards, places
        # In a corpus used in place, a shard's samples are numbered part by part, in the order of their places.
        numbers = np.full(len(samples), -1, np.int64)
        for shard in np.unique(shards[~is_held_out]).tolist():
            mine = np.flatnonzero(shards == shard)
            parts = self.corpus.parts(shard)
            first = sum(len(part.lengths) for part in parts[:source])
            part = parts[source]
            pointers = self._first_byte(source) + samples[mine] * self.sample_length * part.dtype.itemsize
            order = np.argsort(pointers)
            rows = np.flatnonzero(np.isin(part.pointers, pointers))
            found = np.searchsorted(pointers[order], part.pointers[rows])
            numbers[mine[order[found]]] = first + rows
        return shards, numbers

    def _place(self, source: int, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return self._assignment.place(samples + self._assignment.starts[source])
