"""The vocabulary of a SentencePiece `.model`, BPE or unigram."""

import re
from collections.abc import Sequence
from pathlib import Path

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model

from data_scoring.tokenizer.pieces import BYTES, byte_pieces, parts_of

_Piece = sentencepiece_model.ModelProto.SentencePiece
_UNIGRAM, _BPE = sentencepiece_model.TrainerSpec.UNIGRAM, sentencepiece_model.TrainerSpec.BPE
_REQUIRED = {
    _Piece.UNKNOWN: "unknown", _Piece.CONTROL: "control", _Piece.USER_DEFINED: "user-defined", _Piece.BYTE: "byte"
}  # fmt: skip
_SPACE = "▁"
# SentencePiece scores an unknown character with the lowest score of the vocabulary minus this.
_UNKNOWN_PENALTY = 10.0


class SentencePieceVocabulary:
    """See `data_scoring.tokenizer.pieces.Vocabulary`."""

    def __init__(self, path: Path) -> None:
        self._proto = sentencepiece_model.ModelProto()
        try:
            self._proto.ParseFromString(path.read_bytes())
        except DecodeError as error:
            raise ValueError(f"{path}: not a SentencePiece model ({error}); give a .model file") from None
        spec = self._proto.trainer_spec
        if spec.model_type not in (_UNIGRAM, _BPE):
            kind = sentencepiece_model.TrainerSpec.ModelType.Name(spec.model_type)
            raise ValueError(f"{path}: its model is {kind}; give a BPE or unigram model")
        self.pieces: list[str | None] = [entry.piece for entry in self._proto.pieces]
        self._ids = {entry.piece: token for token, entry in enumerate(self._proto.pieces)}
        self._scores = {
            entry.piece: entry.score
            for entry in self._proto.pieces
            if entry.type in (_Piece.NORMAL, _Piece.USER_DEFINED, _Piece.UNUSED)
        }
        self._worst = min(self._scores.values(), default=0.0)
        self._longest = max(map(len, self._scores), default=1)
        self._fixed = {entry.piece for entry in self._proto.pieces if entry.type == _Piece.USER_DEFINED}
        longest_first = sorted(self._fixed, key=len, reverse=True)
        self._symbol = re.compile("|".join([*map(re.escape, longest_first), "."]), re.DOTALL)
        self.required = self._find_required()
        is_bpe = spec.model_type == _BPE
        self.needs = [self._find_parts(token) if is_bpe else () for token in range(len(self.pieces))]
        self._is_bpe = is_bpe

    def _find_required(self) -> dict[int, str]:
        required = {
            token: _REQUIRED[entry.type] for token, entry in enumerate(self._proto.pieces) if entry.type in _REQUIRED
        }
        if self._proto.trainer_spec.byte_fallback and all(piece in self._ids for piece in BYTES):
            # Encoded as bytes, it would be decoded as itself, not as a space.
            if _SPACE in self._ids:
                required.setdefault(self._ids[_SPACE], "space")
            return required
        for piece, token in self._ids.items():
            if len(piece) == 1:
                required.setdefault(token, "alphabet")
            elif any(character not in self._ids for character in piece):
                required.setdefault(token, "only one with its characters")
        return required

    def _find_parts(self, token: int) -> tuple[int, ...]:
        """Return the two sides of a token's last merge; SentencePiece merges any two symbols that form a piece."""
        piece = self._proto.pieces[token].piece
        if token in self.required:
            return ()
        symbols = self._symbol.findall(piece)
        parts = byte_pieces(piece) if len(piece) == 1 else parts_of(piece, symbols, self._priority)
        # Characters without a piece are encoded as bytes, which are required anyway.
        return tuple(self._ids[part] for part in parts if part in self._ids)

    def _priority(self, left: str, right: str) -> float | None:
        # User-defined pieces are never merged.
        if left in self._fixed or right in self._fixed:
            return None
        score = self._scores.get(left + right)
        return None if score is None else -score

    def parts(self, token: int, rank: Sequence[int]) -> Sequence[int]:
        """Return the two sides of the last merge or, for unigram, the best segmentation into pieces of lower rank."""
        return self.needs[token] if self._is_bpe else self._divide(token, rank)

    def _divide(self, token: int, rank: Sequence[int]) -> list[int]:
        piece = self._proto.pieces[token].piece
        best: list[tuple[float, list[int]]] = [(0.0, [])]
        for end in range(1, len(piece) + 1):
            segmentations = []
            for start in range(max(0, end - self._longest), end):
                part = piece[start:end]
                score, tokens = best[start]
                if part in self._scores and rank[self._ids[part]] < rank[token]:
                    segmentations.append((score + self._scores[part], [*tokens, self._ids[part]]))
                elif len(part) == 1:
                    as_bytes = [self._ids[byte] for byte in byte_pieces(part) if byte in self._ids]
                    segmentations.append((score + self._worst - _UNKNOWN_PENALTY, [*tokens, *as_bytes]))
            best.append(max(segmentations))
        return best[-1][1]

    def save(self, kept: Sequence[int], path: Path) -> None:
        """Write a `.model` with only the tokens `kept`."""
        cut = sentencepiece_model.ModelProto()
        cut.CopyFrom(self._proto)
        del cut.pieces[:]
        cut.pieces.extend(self._proto.pieces[token] for token in kept)
        new = {token: number for number, token in enumerate(kept)}
        spec = cut.trainer_spec
        spec.vocab_size = len(kept)
        for field in ("unk_id", "bos_id", "eos_id", "pad_id"):
            setattr(spec, field, new.get(getattr(spec, field), -1))
        path.write_bytes(cut.SerializeToString())
