"""Export of a tokenizer as files that transformers' AutoTokenizer opens and that give the same ids.

A `tokenizer.json` is copied without the post-processor that would add tokens to a text. A SentencePiece model is
converted to `tokenizer.json` if that gives the same ids for every text. It is copied as `tokenizer.model`, too, with or
without conversion: llama.cpp reads only that.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model
from tokenizers import AddedToken, decoders, models, normalizers

from data_scoring.base.files import write_json
from data_scoring.tokenizer.pieces import BYTES
from data_scoring.tokenizer.tokenizer import name_token, open_tokenizer, read_tokenizer

MODEL = "tokenizer.model"
_Piece = sentencepiece_model.ModelProto.SentencePiece
_SPACE = "▁"
# The pattern by which Qwen2 splits text into words.
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def export_tokenizer(path: Path, end_of_document: str | None, max_length: int | None, folder: Path) -> int:
    """Write the tokenizer in `path` to `folder` for AutoTokenizer; return the id of the end-of-document token.

    That token becomes both eos_token and bos_token; encoding adds neither. max_length: the longest sequence, in tokens,
    that the model was trained for.
    """
    end = open_tokenizer(path, end_of_document).end_of_document
    name = name_token(path, end)
    token = {"eos_token": name, "bos_token": name}
    if path.suffix == ".json":
        content = json.loads(read_tokenizer(path))
        # The byte-level post-processor only changes offsets; the others add tokens.
        if (content.get("post_processor") or {}).get("type") != "ByteLevel":
            content["post_processor"] = None
        _write(folder, content, token, max_length)
        return end
    proto = _read(path)
    (folder / MODEL).write_bytes(path.read_bytes())
    if converts_exactly(proto):
        _write(folder, json.loads(convert(proto).to_str()), token, max_length)
    else:
        unknown = proto.pieces[proto.trainer_spec.unk_id].piece
        _write_config(folder, {"tokenizer_class": "SentencePieceBackend", **token, "unk_token": unknown}, max_length)
    return end


def misreading_families(path: Path) -> tuple[str, ...]:
    """Return the model families for which transformers would not use the tokenizer in `path` as its file says.

    For Qwen2 it always splits text into words by Qwen's pattern, and for Qwen2 and Mistral it always converts a
    SentencePiece model.
    """
    if path.suffix != ".json":
        return ("qwen2",) if converts_exactly(_read(path)) else ("qwen2", "mistral")
    content = json.loads(read_tokenizer(path))
    divides = (content.get("pre_tokenizer") or {}).get("pretokenizers") or [{}]
    is_qwen2 = (content.get("normalizer") or {}).get("type") == "NFC" and divides[0].get("pattern") == {"Regex": _QWEN2}
    return () if is_qwen2 else ("qwen2",)


def converts_exactly(proto: Any) -> bool:
    """Return whether a SentencePiece model and the result of `convert` give the same ids for every text.

    They do if the model is BPE with byte fallback, does not normalise text, and has no two merges with equal scores
    that can overlap in a text: SentencePiece takes the left one, tokenizers the first in its list.
    """
    spec, normalizer = proto.trainer_spec, proto.normalizer_spec
    pieces = {entry.piece for entry in proto.pieces}
    kinds = {entry.type for entry in proto.pieces}
    symbols = [entry.piece for entry in proto.pieces if entry.type == _Piece.USER_DEFINED]
    return (
        spec.model_type == spec.BPE
        and spec.byte_fallback
        and pieces.issuperset(BYTES)
        and not spec.treat_whitespace_as_suffix
        and not normalizer.precompiled_charsmap
        and not normalizer.remove_extra_whitespaces
        and normalizer.escape_whitespaces
        and _Piece.UNUSED not in kinds
        # With a symbol inside, each piece of text around it would get its own space prefix.
        and not (symbols and (normalizer.add_dummy_prefix or any(_SPACE in symbol for symbol in symbols)))
        and not _has_ambiguous_ties(proto)
    )


def _has_ambiguous_ties(proto: Any) -> bool:
    by_score: dict[float, list[str]] = defaultdict(list)
    pieces = {entry.piece for entry in proto.pieces if entry.type == _Piece.NORMAL}
    for entry in proto.pieces:
        if entry.type == _Piece.NORMAL and len(entry.piece) > 1:
            by_score[entry.score].append(entry.piece)
    for group in by_score.values():
        if _are_runs(group):
            continue
        ends: dict[str, set[str]] = defaultdict(set)
        for piece in group:
            for start in range(1, len(piece)):
                if piece[start:] in pieces:
                    ends[piece[start:]].add(piece)
        for piece in group:
            starts = (piece[:end] for end in range(1, len(piece)))
            if any(ends.get(start, set()) - {piece} for start in starts):
                return True
    return False


def _are_runs(group: list[str]) -> bool:
    """Return whether the pieces are one character repeated two, three, … times without gaps, as Llama's spaces are.

    For these, merging from left to right equals merging the longest first, which is the order `convert` uses.
    """
    return len({*"".join(group)}) == 1 and sorted(map(len, group)) == list(range(2, len(group) + 2))


def convert(proto: Any) -> tokenizers.Tokenizer:
    """Return a SentencePiece model, for which `converts_exactly` is true, as a tokenizer of the tokenizers library."""
    ids = {entry.piece: token for token, entry in enumerate(proto.pieces)}
    scores = {entry.piece: entry.score for entry in proto.pieces if entry.type == _Piece.NORMAL}
    merges = sorted(
        (-score, -len(piece), ids[piece[:cut]], ids[piece[cut:]])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    )
    names = list(ids)
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab=ids,
            merges=[(names[left], names[right]) for _, _, left, right in merges],
            unk_token=names[proto.trainer_spec.unk_id],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    has_prefix = proto.normalizer_spec.add_dummy_prefix
    to_spaces: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend(_SPACE)] if has_prefix else []), normalizers.Replace(" ", _SPACE)]
    )
    tokenizer.decoder = decoders.Sequence([*to_spaces, *([decoders.Strip(" ", 1, 0)] if has_prefix else [])])
    tokenizer.add_tokens(list(_added(proto, _Piece.USER_DEFINED)))
    tokenizer.add_special_tokens(list(_added(proto, _Piece.CONTROL)))
    return tokenizer


def _read(path: Path) -> Any:
    return sentencepiece_model.ModelProto.FromString(path.read_bytes())


def _added(proto: Any, kind: int) -> Iterable[AddedToken]:
    return (
        AddedToken(entry.piece, normalized=False, special=kind == _Piece.CONTROL)
        for entry in proto.pieces
        if entry.type == kind
    )


def _write(folder: Path, content: dict[str, Any], token: dict[str, str | None], max_length: int | None) -> None:
    content |= {"truncation": None, "padding": None}
    write_json(folder / "tokenizer.json", content)
    _write_config(folder, {"tokenizer_class": "PreTrainedTokenizerFast", **token}, max_length)


def _write_config(folder: Path, config: dict[str, Any], max_length: int | None) -> None:
    plain = {
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        # A special token that appears in a text is encoded as text, as in training.
        "split_special_tokens": True,
    }
    length = {} if max_length is None else {"model_max_length": max_length}
    write_json(folder / "tokenizer_config.json", {**config, **plain, **length})
