"""The ids of a long text are those of the text in one piece, wherever it might be cut."""

import random
from pathlib import Path

import pytest

from data_scoring.tokenizer import long_texts
from data_scoring.tokenizer.tokenizer import open_tokenizer
from tests.data_scoring.tokenizer.tokenizer_kinds import KINDS, encode_by_library, make_kind

# What a cut may fall into: words, runs of white space, combining characters, surrogate pairs in UTF-16, a special
# token's text, contractions, and characters that normalise together or away.
_PARTS = [
    "the", "model", "the model", "loss", " ", "  ", "\n", "\n\n", " \n ", "\t", "\r\n", "it's", "'", "12", "345", "!",
    "...", "e\u0301", "\u0301", "🦄", "👩‍👩‍👧", "中文", "。", "</s>", "<unk>", "\u00a0", "\u2028", "\u200b", "\u3000",
    "ﬁ", "İ", "\x1c", "\u0085", "text", "x" * 50, "ก็", "가", "\ufeff",
]  # fmt: skip


def random_texts(number: int) -> list[str]:
    generator = random.Random(number)
    return ["".join(generator.choices(_PARTS, k=generator.randint(1, 400))) for _ in range(30)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_has_the_ids_that_it_has_in_one_piece(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_kind(kind, tmp_path)
    tokenizer = open_tokenizer(path, None)
    texts = [*random_texts(KINDS.index(kind)), "", "a" * 1000, " " * 1000, "\n" * 1000]
    for length in (1, 7, 64):
        monkeypatch.setattr(long_texts, "_PIECE_CHARACTERS", length)
        assert tokenizer.encode_batch(texts) == [encode_by_library(path, text) for text in texts]


def test_pieces_are_bounded_where_words_are_separate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "_PIECE_CHARACTERS", 20)
    text = "some words and more\n" * 50
    pieces = [*long_texts.cut_text(text)]
    assert "".join(pieces) == text
    assert all(20 <= len(piece) < 20 + len("words") for piece in pieces[:-1])
    # One that puts a space before each text must not be cut.
    for kind, expected in (("byte-level", True), ("byte-level-prefix-space", False), ("byte-level-normalised", False)):
        assert long_texts.can_cut(open_tokenizer(make_kind(kind, tmp_path), None)._tokenizer) is expected  # type: ignore[attr-defined]
