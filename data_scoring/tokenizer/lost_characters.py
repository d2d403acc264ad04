"""Characters of a text that a tokenizer cannot represent: it drops them, or encodes them as its unknown token."""

import json
from itertools import count
from typing import Any

import tokenizers

from data_scoring.tokenizer.pieces import BYTES

# A noncharacter, which no text contains.
_MARK = "\ufdd0"


class LostCharacters:
    """Finds the lost characters of texts that a tokenizer of the `tokenizers` library encodes."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        content: dict[str, Any] = json.loads(tokenizer.to_str())
        model = content["model"]
        self._is_silent = model["type"] == "BPE" and model["unk_token"] is None
        self._tokenizer: tokenizers.Tokenizer = tokenizer
        self._unknown: int | None = None
        if not self._is_silent:
            self._unknown = model["unk_id"] if model["type"] == "Unigram" else model["vocab"].get(model["unk_token"])
        elif not _has_all_bytes(content):
            self._tokenizer, self._unknown = _with_unknown(content)

    def find(self, texts: list[str], encoded: list[list[int]]) -> list[str]:
        """Return the lost characters of each text, given the ids of each."""
        if self._unknown is None:
            return [""] * len(texts)
        # A tokenizer without an unknown token leaves no trace of what it drops.
        suspects = [place for place, ids in enumerate(encoded) if self._is_silent or self._unknown in ids]
        lost = [""] * len(texts)
        encodings = self._tokenizer.encode_batch([texts[place] for place in suspects], add_special_tokens=False)
        for place, encoding in zip(suspects, encodings, strict=True):
            lost[place] = self._text_of_unknown(texts[place], encoding)
        return lost

    def _text_of_unknown(self, text: str, encoding: tokenizers.Encoding) -> str:
        parts, last = [], 0
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            # All bytes of a character have the same offsets.
            if token == self._unknown and end > last:
                parts.append(text[max(start, last) : end])
                last = end
        return "".join(parts)


def _has_all_bytes(content: dict[str, Any]) -> bool:
    """Return whether every character is a token or a sequence of byte tokens."""
    model = content["model"]
    if model["byte_fallback"] and model["vocab"].keys() >= {*BYTES}:
        return True
    steps = [content["normalizer"], content["pre_tokenizer"]]
    steps += [each for step in steps if step for key in ("normalizers", "pretokenizers") for each in step.get(key, ())]
    is_byte_level = any(step and step["type"] == "ByteLevel" for step in steps)
    is_plain = not model["continuing_subword_prefix"] and not model["end_of_word_suffix"]
    return is_byte_level and is_plain and model["vocab"].keys() >= {*tokenizers.pre_tokenizers.ByteLevel.alphabet()}


def _with_unknown(content: dict[str, Any]) -> tuple[tokenizers.Tokenizer, int]:
    """Return the tokenizer with an unknown token in place of the characters that it drops, and this token's id."""
    model, added = content["model"], content["added_tokens"]
    # The library may give added tokens the ids that follow the model's, of which there is one more now.
    number = 2 + len(added) + max([-1, *model["vocab"].values(), *(token["id"] for token in added)])
    taken = {*model["vocab"], *(token["content"] for token in added)}
    name = next(name for length in count(1) if (name := _MARK * length) not in taken)
    vocab = {**model["vocab"], name: number}
    changed = {**content, "model": {**model, "vocab": vocab, "unk_token": name, "fuse_unk": True}}
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(changed))
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, number
