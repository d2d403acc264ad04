"""The vocabulary of a Hugging Face `tokenizer.json` with a BPE model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from data_scoring.tokenizer.pieces import BYTES, byte_pieces, parts_of
from data_scoring.tokenizer.tokenizer import read_tokenizer

_TEMPLATE = "template"
_UNSUPPORTED = ("continuing_subword_prefix", "end_of_word_suffix", "dropout")


class HuggingFaceVocabulary:
    """See `data_scoring.tokenizer.pieces.Vocabulary`."""

    def __init__(self, path: Path) -> None:
        content = read_tokenizer(path)
        self._json: dict[str, Any] = json.loads(content)
        self._model = self._json["model"]
        read = tokenizers.Tokenizer.from_buffer(content)
        # Old files do not name the kind of model; the library infers it.
        self._check(path, type(read.model).__name__)
        # The library's ids, not the file's: it numbers added tokens that the model lacks as it reads them.
        self._ids: dict[str, int] = read.get_vocab(with_added_tokens=True)
        self.pieces: list[str | None] = [None] * (max(self._ids.values()) + 1)
        for piece, token in self._ids.items():
            self.pieces[token] = piece
        # The library ignores added tokens without content.
        self._added_tokens = [token for token in self._json.get("added_tokens", []) if token["content"]]
        self._ranks = {_pair(merge): rank for rank, merge in enumerate(self._model["merges"])}
        self.required = self._find_required()
        self._require_paths()
        self.needs = [self._find_parts(token) for token in range(len(self.pieces))]

    def _check(self, path: Path, kind: str) -> None:
        kind = self._model.get("type", kind)
        if kind != "BPE":
            raise ValueError(f"{path}: its model is {kind}; give a BPE tokenizer or a SentencePiece .model")
        for field in _UNSUPPORTED:
            if self._model.get(field):
                raise ValueError(
                    f"{path}: its model has {field} {self._model[field]!r}, which pruning does not support; "
                    "give a tokenizer without it"
                )

    def _find_required(self) -> dict[int, str]:
        ids = self._ids
        required = {ids[token["content"]]: "added token" for token in self._added_tokens}
        if self._model.get("unk_token") in ids:
            required.setdefault(ids[self._model["unk_token"]], "unknown")
        for piece in _named(self._json.get("post_processor")) | _named(self._json.get("padding")):
            if piece in ids:
                required.setdefault(ids[piece], _TEMPLATE)
        in_model: dict[str, int] = self._model["vocab"]
        if self._model.get("byte_fallback") and all(piece in in_model for piece in BYTES):
            for piece in BYTES:
                required.setdefault(ids[piece], "byte")
            # Decoders replace it by a space before they decode bytes.
            if "▁" in in_model:
                required.setdefault(ids["▁"], "space")
        else:
            for piece in in_model:
                if len(piece) == 1:
                    required.setdefault(ids[piece], "alphabet")
                elif any(character not in in_model for character in piece):
                    required.setdefault(ids[piece], "only one with its characters")
        return required

    def _require_paths(self) -> None:
        """Require the parts of tokens that templates name: these tokens may also occur as plain text."""
        stack = [token for token, reason in self.required.items() if reason == _TEMPLATE]
        while stack:
            for part in self._find_parts(stack.pop()):
                if part not in self.required:
                    self.required[part] = _TEMPLATE
                    stack.append(part)

    def _find_parts(self, token: int) -> tuple[int, ...]:
        piece = self.pieces[token]
        is_whole = self.required.get(token, _TEMPLATE) != _TEMPLATE
        if piece is None or is_whole or piece not in self._model["vocab"]:
            return ()
        if len(piece) == 1:
            parts = byte_pieces(piece)
        else:
            parts = parts_of(piece, list(piece), lambda left, right: self._ranks.get((left, right)))
        return tuple(self._ids[part] for part in parts if part in self._ids)

    def parts(self, token: int, rank: Sequence[int]) -> Sequence[int]:
        """Return the two sides of the token's last merge, or the bytes of a character."""
        return self.needs[token]

    def save(self, kept: Sequence[int], path: Path) -> None:
        """Write a `tokenizer.json` with only the tokens `kept`.

        Raises ValueError if the library would give them other ids.
        """
        new = {piece: number for number, piece in enumerate(self.pieces[token] for token in kept)}
        model = self._model
        vocab = {piece: new[piece] for piece in model["vocab"] if piece in new}
        merges = [
            merge for merge in model["merges"]
            if all(piece in vocab for piece in (*_pair(merge), "".join(_pair(merge))))
        ]  # fmt: skip
        content = {
            **self._json,
            "added_tokens": [{**token, "id": new[token["content"]]} for token in self._added_tokens],
            "post_processor": _renumber(self._json.get("post_processor"), new),
            "padding": _renumber(self._json.get("padding"), new),
            "model": {**model, "vocab": vocab, "merges": merges},
        }
        path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
        if tokenizers.Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True) != new:
            raise ValueError(
                "the tokenizer's added tokens have ids between those of its model, which cannot be kept; "
                "give them ids after the model's, or add them to the model's vocabulary"
            )


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _named(value: Any) -> set[str]:
    """Return the tokens that a post-processor or padding section names."""
    if not isinstance(value, dict):
        return set()
    names = {value[field][0] for field in ("sep", "cls") if isinstance(value.get(field), list)}
    for token in (value.get("special_tokens") or {}).values() if isinstance(value.get("special_tokens"), dict) else ():
        names |= set(token["tokens"])
    if "pad_token" in value:
        names.add(value["pad_token"])
    for processor in value.get("processors") or ():
        names |= _named(processor)
    return names


def _renumber(value: Any, new: dict[str | None, int]) -> Any:
    """Return a post-processor or padding section with the ids of its tokens replaced by those in `new`."""
    if not isinstance(value, dict):
        return value
    renumbered = dict(value)
    for field in ("sep", "cls"):
        if isinstance(value.get(field), list):
            renumbered[field] = [value[field][0], new[value[field][0]]]
    if isinstance(value.get("special_tokens"), dict):
        renumbered["special_tokens"] = {
            name: {**token, "ids": [new[piece] for piece in token["tokens"]]}
            for name, token in value["special_tokens"].items()
        }
    if "pad_token" in value:
        # A padding token outside the vocabulary has no new id.
        renumbered["pad_id"] = new.get(value["pad_token"], value["pad_id"])
    if isinstance(value.get("processors"), list):
        renumbered["processors"] = [_renumber(processor, new) for processor in value["processors"]]
    return renumbered
