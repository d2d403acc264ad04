"""Cutting long texts where it provably does not change their tokens, which bounds memory and keeps all cores busy."""

import re
from collections.abc import Iterator

import tokenizers

# While a text is encoded it takes about 140 bytes of memory per character, so that longer ones are cut.
_PIECE_CHARACTERS = 1 << 20
_CUT = re.compile(r"(?<=\S)[ \n]")


def can_cut(tokenizer: tokenizers.Tokenizer) -> bool:
    """Return whether the tokens of a text are those of its pieces, if it is cut as `cut_text` does.

    They are if nothing looks across a cut: GPT-2's pattern, by which `ByteLevel` splits text into words, has no word
    in which white space follows other characters. Other tokenizers may put a space before each text, merge tokens
    across words or normalise whole texts.
    """
    words = tokenizer.pre_tokenizer
    return (
        tokenizer.normalizer is None
        and isinstance(words, tokenizers.pre_tokenizers.ByteLevel)
        and words.use_regex
        and not words.add_prefix_space
        and not any(
            token.lstrip or token.rstrip or re.search(r"\s", token.content)
            for token in tokenizer.get_added_tokens_decoder().values()
        )
    )


def cut_text(text: str) -> Iterator[str]:
    """Yield the pieces of a text, each of at least a million characters, cut before white space that follows none."""
    start = 0
    while cut := _CUT.search(text, start + _PIECE_CHARACTERS):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]
