"""Search for the n-grams of evaluation items in the training text, decoded document by document.

An n-gram may span two samples, so text is read in its own order, not in that of the shards. The samples of an n-gram
are determined only when it is found. The text is divided into parts, with a task for each: it searches the documents
that begin in its part, of which the last may end in a later one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_scoring.base.engine import Count, Engine, reporting
from data_scoring.base.progress import Progress
from data_scoring.contamination.item_ngrams import Ngrams
from data_scoring.contamination.ngrams import Units, split_units
from data_scoring.corpus.corpus import Corpus
from data_scoring.corpus.reading_order import ReadingOrder
from data_scoring.tokenizer.tokenizer import Tokenizer

# An n-gram in more documents than this is a common phrase (GPT-3, its appendix on test set contamination).
MOST_DOCUMENTS = 10
# Longer documents are decoded in pieces, which overlap by more tokens than an n-gram can have.
_PIECE_TOKENS = 1 << 13
_TOKENS_PER_UNIT = 32
_CONTEXT_TOKENS = 16
# A part of the text, which takes about a minute to search.
_PART_TOKENS = 1 << 26


@dataclass(frozen=True)
class Overlaps:
    """Which samples contain which n-grams: `ngrams`, `sources` and `samples`, [n] int64 each, distinct rows.

    Samples are numbered in the reading order of their source. Common n-grams, `is_common` [num_ngrams] bool, have no
    rows.
    """

    ngrams: NDArray[np.int64]
    sources: NDArray[np.int64]
    samples: NDArray[np.int64]
    is_common: NDArray[np.bool_]


@dataclass(frozen=True)
class _Piece:
    """A piece of a document: its tokens; `start` is the position of the first one in the source."""

    document: int
    start: int
    tokens: NDArray[np.integer]
    is_head: bool
    is_tail: bool


@dataclass(frozen=True)
class _Part:
    """The documents of a source that begin at its tokens `start` to `stop` - 1."""

    source: int
    start: int
    stop: int


@dataclass(frozen=True)
class _Found:
    """What was found in a part: n-grams, ascending, with the number of documents of each, [n] int64, and `rows`.

    rows: [n, 3] int64, distinct: n-gram, source, sample, of the n-grams that are not common in the part alone.
    """

    ngrams: NDArray[np.int64]
    num_documents: NDArray[np.int64]
    rows: NDArray[np.int64]


def find_overlaps(
    order: ReadingOrder,
    open_tokenizer: Callable[[], Tokenizer],
    ngrams: Ngrams,
    engine: Engine,
    scratch: Path,
    progress: Progress,
) -> Overlaps:
    """Return which samples of the corpus contain which of `ngrams`, which workers read from the folder `scratch`."""
    path = scratch / "ngrams.npz"
    ngrams.save(path)
    parts = [
        _Part(source, start, min(start + _PART_TOKENS, num_tokens))
        for source, num_tokens in enumerate(map(order.num_source_tokens, range(len(order.sources))))
        for start in range(0, num_tokens, _PART_TOKENS)
    ]
    work = partial(_search_part, order.corpus.folder, order.seed, open_tokenizer, path)
    report = reporting(progress, "looking for evaluation items (tokens)", order.num_tokens)
    num_documents = np.zeros(len(ngrams.hashes), np.int64)
    rows = [np.empty((0, 3), np.int64)]
    for found in engine.map(work, parts, report, is_long=order.num_tokens > _PART_TOKENS):
        # No document is in two parts.
        num_documents[found.ngrams] += found.num_documents
        # Rows of n-grams that are common by now are of no use; so what is kept does not grow with the text.
        rows.append(found.rows[num_documents[found.rows[:, 0]] <= MOST_DOCUMENTS])
    is_common = np.asarray(num_documents > MOST_DOCUMENTS)
    distinct = np.unique(np.concatenate(rows), axis=0)
    distinct = distinct[~is_common[distinct[:, 0]]]
    return Overlaps(distinct[:, 0], distinct[:, 1], distinct[:, 2], is_common)


def _search_part(
    folder: Path, seed: int, open_tokenizer: Callable[[], Tokenizer], ngrams: Path, part: _Part, count: Count
) -> _Found:
    """Return what of the n-grams in the file `ngrams` is in a part."""
    order, known = ReadingOrder(Corpus(folder), seed), Ngrams.load(ngrams)
    first = _first_document(order, part)
    search = _Search(open_tokenizer(), known, order.sample_length)
    if first is not None:
        for pieces in _cut(order, part, first, known.longest * _TOKENS_PER_UNIT):
            if pieces:
                search.look(part.source, pieces)
                count(min(pieces[-1].start, part.stop) - part.start)
    count(part.stop - part.start)
    return search.result()


def _first_document(order: ReadingOrder, part: _Part) -> int | None:
    """Return the place at which the first document of a part begins, or None if none does."""
    if part.start == 0:
        return 0
    end = int(order.corpus.manifest["end_of_document"])
    # A document begins after the last token of another.
    place = part.start - 1
    for block in order.blocks(part.source, place):
        ends = np.flatnonzero(block[: part.stop - 1 - place] == end)
        if len(ends):
            return place + int(ends[0]) + 1
        place += len(block)
        if place >= part.stop - 1:
            break
    return None


def _cut(order: ReadingOrder, part: _Part, first: int, overlap: int) -> Iterator[list[_Piece]]:
    """Yield lists of pieces of the documents of a part, the first of which begins at `first`."""
    end = int(order.corpus.manifest["end_of_document"])
    rest: NDArray[np.integer] = np.empty(0, np.int64)
    # Position of the rest in the source, and whether a document begins there.
    position, is_head, document = first, True, 0
    for block in chain(order.blocks(part.source, first), [None]):
        tokens = rest if block is None else np.concatenate([rest, block])
        stops = np.flatnonzero(tokens == end).tolist()
        is_over = [True] * len(stops)
        if len(tokens) > (stops[-1] + 1 if stops else 0):
            # The last document may continue in the next block, unless the source ends here.
            stops.append(len(tokens))
            is_over.append(block is None)
        pieces, start = [], 0
        for stop, ends in zip(stops, is_over, strict=True):
            while stop - start > _PIECE_TOKENS:
                piece = tokens[start : start + _PIECE_TOKENS]
                pieces.append(_Piece(document, position + start, piece, is_head, is_tail=False))
                start, is_head = start + _PIECE_TOKENS - overlap, False
            if ends:
                pieces.append(_Piece(document, position + start, tokens[start:stop], is_head, is_tail=True))
                start, is_head, document = stop + 1, True, document + 1
                if position + start >= part.stop:
                    yield pieces
                    return
        rest, position = tokens[start:], position + start
        yield pieces


class _Search:
    """The state of a search: the overlaps found so far."""

    def __init__(self, tokenizer: Tokenizer, known: Ngrams, sample_length: int) -> None:
        self._tokenizer, self._known, self._sample_length = tokenizer, known, sample_length
        # The number of documents that contain each n-gram, and the last such document.
        self._num_documents = np.zeros(len(known.hashes), np.int64)
        self._last_document = np.full(len(known.hashes), -1, np.int64)
        self._found = [np.empty((0, 3), np.int64)]

    def look(self, source: int, pieces: list[_Piece]) -> None:
        """Search some pieces of documents; those of one document must come in order."""
        units = split_units(self._tokenizer.decode_batch([piece.tokens.tolist() for piece in pieces]))
        ngrams, firsts, lasts = self._known.find(_without_fragments(units, pieces))
        if not len(ngrams):
            return
        self._count(ngrams, np.array([piece.document for piece in pieces])[units.owners[firsts]])
        listed = np.flatnonzero(~self._is_common[ngrams])
        listed = listed[np.argsort(firsts[listed], kind="stable")]
        owners, bounds = np.unique(units.owners[firsts[listed]], return_index=True)
        for owner, mine in zip(owners.tolist(), np.split(listed, bounds[1:]), strict=False):
            before = int(np.searchsorted(units.owners, owner))
            samples = self._samples_of(pieces[owner], np.stack([firsts[mine], lasts[mine]]) - before)
            self._add(ngrams[mine], source, *samples)

    def _count(self, ngrams: NDArray[np.int64], documents: NDArray[np.int64]) -> None:
        ngrams, documents = np.unique(np.stack([ngrams, documents]), axis=1)
        # Documents come in order, so only the last one of an earlier call can recur.
        is_new = documents != self._last_document[ngrams]
        np.add.at(self._num_documents, ngrams[is_new], 1)
        self._last_document[ngrams] = documents

    @property
    def _is_common(self) -> NDArray[np.bool_]:
        return np.asarray(self._num_documents > MOST_DOCUMENTS)

    def _samples_of(self, piece: _Piece, units: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the samples in which the given units of a piece begin, in the shape of `units`."""
        length = self._sample_length
        first = piece.start // length
        borders = np.arange((first + 1) * length, piece.start + len(piece.tokens), length) - piece.start
        if not len(borders):
            return np.full_like(units, first)
        # Units are counted from border to border, with a few tokens of context before, because the first tokens of a
        # text may decode differently from the same tokens inside it.
        lasts = [0, *borders[:-1].tolist()]
        starts = [max(0, last - _CONTEXT_TOKENS) for last in lasts]
        spans = [*zip(starts, borders.tolist(), strict=True), *zip(starts, lasts, strict=True)]
        parts = self._tokenizer.decode_batch([piece.tokens[start:stop].tolist() for start, stop in spans])
        up_to, before = np.bincount(split_units(parts).owners, minlength=len(parts)).reshape(2, -1)
        return np.asarray(first + np.searchsorted(np.cumsum(up_to - before), units, side="right"))

    def _add(self, ngrams: NDArray[np.int64], source: int, firsts: NDArray[np.int64], lasts: NDArray[np.int64]) -> None:
        """Record that the samples `firsts` to `lasts` contain parts of `ngrams`."""
        sizes = lasts - firsts + 1
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        rows = [np.repeat(ngrams, sizes), np.full(len(within), source), np.repeat(firsts, sizes) + within]
        self._found.append(np.unique(np.stack(rows, axis=1), axis=0))

    def result(self) -> _Found:
        """Return all that was found."""
        rows = np.unique(np.concatenate(self._found), axis=0)
        ngrams = np.flatnonzero(self._num_documents)
        return _Found(ngrams, self._num_documents[ngrams], rows[~self._is_common[rows[:, 0]]])


def _without_fragments(units: Units, pieces: list[_Piece]) -> Units:
    """Return `units` such that no n-gram contains a unit at which a document was cut, which may be half a word.

    Nothing is lost: the n-grams there are also in the next or the previous piece.
    """
    owners = units.owners.copy()
    numbers = np.arange(len(pieces))
    starts, stops = np.searchsorted(units.owners, numbers), np.searchsorted(units.owners, numbers, side="right")
    has_units = stops > starts
    has_no_start = numbers[has_units & [not piece.is_head for piece in pieces]]
    has_no_end = numbers[has_units & [not piece.is_tail for piece in pieces]]
    owners[starts[has_no_start]] = -2 * has_no_start - 1
    owners[stops[has_no_end] - 1] = -2 * has_no_end - 2
    return replace(units, owners=owners)
