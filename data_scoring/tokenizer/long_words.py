"""Splitting very long words, such as base64 or minified code, before a tokenizer is trained.

A trainer updates a whole word for each merge in it, so that its time grows with the square of a word's length.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

_LONGEST_WORD = 1000
_PART_CHARACTERS = 100
# Words as GPT-2's pattern divides text by white space; it divides them further by kinds of characters.
_RUN = re.compile(r" ?\S+|\s+(?!\S)|\s+")


def split_long_words(texts: Iterable[str], pre_tokenizer: Any) -> Iterator[str]:
    """Yield `texts`, with each word of more than 1000 characters in parts of 100, each a text of its own.

    pre_tokenizer: a `ByteLevel` pre-tokenizer of the tokenizers library, which divides text into words.
    """
    for text in texts:
        start = 0
        for run in _RUN.finditer(text) if len(text) > _LONGEST_WORD else ():
            if run.end() - run.start() > _LONGEST_WORD:
                for word in _long_words(run[0], pre_tokenizer):
                    yield text[start : run.start() + word.start]
                    yield from (
                        run[0][place : min(place + _PART_CHARACTERS, word.stop)]
                        for place in range(word.start, word.stop, _PART_CHARACTERS)
                    )
                    start = run.start() + word.stop
        yield text[start:]


def _long_words(run: str, pre_tokenizer: Any) -> Iterator[slice]:
    for _, (start, end) in pre_tokenizer.pre_tokenize_str(run):
        if end - start > _LONGEST_WORD:
            yield slice(start, end)
