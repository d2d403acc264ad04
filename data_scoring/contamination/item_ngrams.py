"""An index of the n-grams of evaluation items, for lookup in text."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_scoring.contamination.ngrams import Units, hash_ngrams, split_units
from data_scoring.evaluation.items import ItemText

# An item with fewer units than an n-gram is one n-gram by itself. Items shorter than this are left out: they would be
# found anywhere (GPT-3's lower bound).
SHORTEST = 8
# Hashes are first looked up by their high bits, in a table that fits into the processor's cache.
_TABLE_BITS = 22
_CHUNK_CHARACTERS = 1 << 22


@dataclass(frozen=True)
class Ngrams:
    """Distinct n-grams: their `hashes`, [num_ngrams] uint64, ascending, of runs of `lengths` units.

    `longest` is the requested n.
    """

    longest: int
    lengths: frozenset[int]
    hashes: NDArray[np.uint64]

    def save(self, path: Path) -> None:
        """Write the n-grams to the file `path`."""
        with path.open("wb") as file:
            np.savez(file, longest=self.longest, lengths=sorted(self.lengths), hashes=self.hashes)

    @classmethod
    def load(cls, path: Path) -> "Ngrams":
        """Return the n-grams that `save` wrote."""
        with np.load(path) as content:
            return cls(int(content["longest"]), frozenset(content["lengths"].tolist()), content["hashes"])

    @cached_property
    def _table(self) -> NDArray[np.bool_]:
        table = np.zeros(1 << _TABLE_BITS, bool)
        table[self.hashes >> np.uint64(64 - _TABLE_BITS)] = True
        return table

    def find(self, units: Units) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return the n-grams found in `units`: their numbers, and their first and last units, [n] int64 each."""
        found = [np.empty((3, 0), np.int64)]
        for length, hashes, is_within in hash_ngrams(units, self.lengths):
            firsts = np.flatnonzero(self._table[hashes >> np.uint64(64 - _TABLE_BITS)] & is_within)
            ngrams = np.searchsorted(self.hashes[:-1], hashes[firsts])
            is_found = self.hashes[ngrams] == hashes[firsts]
            found.append(np.stack([ngrams, firsts, firsts + length - 1])[:, is_found])
        ngrams, firsts, lasts = np.concatenate(found, axis=1)
        return ngrams, firsts, lasts


@dataclass(frozen=True)
class ItemIndex:
    """The n-grams of items.

    Each row of `ngrams`, `owners` and `places`, [n] int64, is the number of an n-gram in `distinct`, an item that
    contains it, and the unit of the item at which it first begins. Items that are too short have no row.
    """

    items: list[ItemText]
    distinct: Ngrams
    ngrams: NDArray[np.int64]
    owners: NDArray[np.int64]
    places: NDArray[np.int64]


def index_items(items: list[ItemText], ngram: int) -> ItemIndex:
    """Return the index of all runs of `ngram` units in `items`."""
    hashes: list[NDArray[np.uint64]] = [np.empty(0, np.uint64)]
    owners: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    places: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    lengths = set()
    for first, texts in _chunks(items):
        units = split_units(texts)
        counts = np.bincount(units.owners, minlength=len(texts))
        # The length of each item's n-grams; 0 for items that are too short.
        wanted = np.where(counts >= min(SHORTEST, ngram), np.minimum(counts, ngram), 0)
        present = set(np.unique(wanted[wanted > 0]).tolist())
        lengths |= present
        starts = np.concatenate([[0], np.cumsum(counts)])
        for length, values, is_within in hash_ngrams(units, present):
            chosen = np.flatnonzero(is_within & (wanted[units.owners[: len(values)]] == length))
            hashes.append(values[chosen])
            owners.append(first + units.owners[chosen])
            places.append(chosen - starts[units.owners[chosen]])
    distinct, ngrams = np.unique(np.concatenate(hashes), return_inverse=True)
    all_owners, all_places = np.concatenate(owners), np.concatenate(places)
    # The first place of each n-gram in each item.
    order = np.lexsort((all_places, all_owners, ngrams))
    ngrams, all_owners, all_places = ngrams[order], all_owners[order], all_places[order]
    is_first = np.ones(len(order), bool)
    is_first[1:] = (ngrams[1:] != ngrams[:-1]) | (all_owners[1:] != all_owners[:-1])
    found = Ngrams(ngram, frozenset(lengths), distinct)
    return ItemIndex(items, found, ngrams[is_first], all_owners[is_first], all_places[is_first])


def _chunks(items: list[ItemText]) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of the first item, texts) for successive chunks of items."""
    start, characters = 0, 0
    for number, item in enumerate(items):
        characters += len(item.text)
        if characters >= _CHUNK_CHARACTERS or number + 1 == len(items):
            yield start, [other.text for other in items[start : number + 1]]
            start, characters = number + 1, 0
