"""N-grams of text as hashes: splitting text into units, and hashing runs of units.

In scripts with spaces between words, a unit is a word: a run of letters, digits and marks. In scripts without (such as
Chinese, Japanese and Thai), it is a single character. Text is normalised by NFKC and lower-cased; punctuation and white
space only separate words.
"""

import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from data_scoring.corpus.permutation import mix_bits

_SEPARATOR, _WORD, _SINGLE = 0, 1, 2
# Separates texts; never part of a unit.
_END = "\0"
# Thai, Lao; Myanmar; Khmer; kana and Han with the blocks between; compatibility and supplementary-plane Han.
_WITHOUT_SPACES = (
    (0x0E00, 0x0F00), (0x1000, 0x10A0), (0x1780, 0x1800), (0x3005, 0x3008), (0x3040, 0x3100), (0x3400, 0x4DC0),
    (0x4E00, 0xA000), (0xF900, 0xFB00), (0x20000, 0x40000),
)  # fmt: skip
# Odd and large multipliers, so that products spread over all 64 bits.
_CHARACTER = np.uint64(0xD6E8FEB86659FD93)
_UNIT = np.uint64(0xA24BAED4963EE407)


@dataclass(frozen=True)
class Units:
    """The units of some texts, in order; all arrays are [num_units].

    `text` is all texts, normalised and joined; `starts` and `ends`, int64, are the character ranges of units in it;
    `owners`, int64, are the numbers of the units' texts; `hashes`, uint64, are hashes of the units' characters.
    """

    text: str
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    owners: NDArray[np.int64]
    hashes: NDArray[np.uint64]


def split_units(texts: list[str]) -> Units:
    """Return the units of `texts`."""
    text = _END.join(_normalise(each.replace(_END, " ")) for each in texts)
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    kinds = _kinds()[codes]
    is_word = kinds == _WORD
    is_first = is_word.copy()
    is_first[1:] &= ~is_word[:-1]
    kept = np.flatnonzero(kinds)
    is_start = (is_first | (kinds == _SINGLE))[kept]
    starts = kept[is_start]
    if not len(starts):
        return Units(text, starts, starts, starts, np.empty(0, np.uint64))
    firsts = np.flatnonzero(is_start)
    lengths = np.diff(np.append(firsts, len(kept)))
    # The hash of a unit is a polynomial of its characters, with powers counted from the unit's start.
    places = kept - np.repeat(starts, lengths)
    powers = _powers(int(lengths.max()))
    hashes = mix_bits(np.add.reduceat((codes[kept].astype(np.uint64) + np.uint64(1)) * powers[places], firsts))
    bounds = [0, *np.searchsorted(starts, np.flatnonzero(codes == 0)), len(starts)]
    owners = np.repeat(np.arange(len(texts)), np.diff(bounds))
    return Units(text, starts, starts + lengths, owners, hashes)


def _normalise(text: str) -> str:
    return text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).lower()


def hash_ngrams(units: Units, lengths: Collection[int]) -> Iterator[tuple[int, NDArray[np.uint64], NDArray[np.bool_]]]:
    """Yield for each n in `lengths`: n, the hashes of all runs of n units, uint64, and which runs are within one text.

    Runs are numbered by their first unit. Two different runs have the same hash with a probability of 2^-64.
    """
    hashes = np.zeros(len(units.hashes) + 1, np.uint64)
    for length in range(1, min(max(lengths, default=0), len(units.hashes)) + 1):
        hashes = hashes[:-1] * _UNIT + units.hashes[length - 1 :]
        if length in lengths:
            yield length, hashes ^ np.uint64(length), units.owners[: len(hashes)] == units.owners[length - 1 :]


def _powers(count: int) -> NDArray[np.uint64]:
    return np.asarray(np.cumprod(np.full(count, _CHARACTER)))


@cache
def _kinds() -> NDArray[np.uint8]:
    """Return the kind of every character: part of a word, a unit by itself, or neither."""
    kinds = np.array([unicodedata.category(chr(code))[0] in "LNM" for code in range(0x110000)], np.uint8)
    for start, stop in _WITHOUT_SPACES:
        kinds[start:stop] *= _SINGLE
    return kinds
