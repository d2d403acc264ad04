"""The text of a continuation while its tokens come."""

from collections.abc import Sequence

from data_scoring.tokenizer.tokenizer import Tokenizer

# What decoders put in place of bytes that are no whole character, such as the first bytes of one.
_INCOMPLETE = "\ufffd"


class StreamedText:
    """Decodes the tokens that follow a prompt. A character is held back until its last token has come.

    Tokens are decoded after the prompt's: a tokenizer may decode the first token of a text without its space.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer, self._prompt = tokenizer, list(prompt)
        self._before = tokenizer.decode(self._prompt)
        self.tokens: list[int] = []
        self.text, self.is_over = "", False

    def add(self, tokens: Sequence[int], is_over: bool = False) -> str:
        """Return the text that `tokens`, the next ones, and the last ones if `is_over`, add to `text`."""
        self.tokens += tokens
        self.is_over = is_over
        whole = self._tokenizer.decode([*self._prompt, *self.tokens])
        # Unless a decoder changes the prompt's text, which then cannot be taken away.
        is_kept = whole.startswith(self._before)
        whole = whole[len(self._before) :] if is_kept else self._tokenizer.decode(self.tokens)
        text = whole.rstrip(_INCOMPLETE)
        if not text.startswith(self.text) and text != whole:
            # Decoders with byte fallback take back the bytes before an incomplete character until it is whole.
            return ""
        # What was returned cannot be taken back, if the decoder has changed it.
        num_kept = next(
            (n for n, pair in enumerate(zip(text, self.text, strict=False)) if pair[0] != pair[1]), len(self.text)
        )
        new, self.text = text[num_kept:], text
        return new
