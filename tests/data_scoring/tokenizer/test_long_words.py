"""A trainer gets no word that is so long that training would take quadratic time, and otherwise the text as it is."""

import random
import string
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers

from data_scoring.config import TokenizerConfig
from data_scoring.tokenizer import tokenizer as tokenizer_module
from data_scoring.tokenizer.long_words import split_long_words
from data_scoring.tokenizer.tokenizer import install_tokenizer
from tests.conftest import make_documents

_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
_LETTERS = "".join(random.Random(0).choices(string.ascii_lowercase, k=5000))


def lengths(texts: list[str]) -> list[int]:
    return [end - start for text in texts for _, (start, end) in _WORDS.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    "text",
    [
        _LETTERS, f"before {_LETTERS} after", f"'{_LETTERS}'s 12", " " * 5000, f"a{' ' * 5000}b", "7" * 5000,
        "=" * 5000, "\n" * 5000, "中" * 5000, f"x  {'é' * 5000}\n{_LETTERS}!", "\t \n" * 2000,
    ],
)  # fmt: skip
def test_long_words_are_split_and_nothing_is_lost(text: str) -> None:
    parts = [*split_long_words([text], _WORDS)]
    assert max(lengths([text])) > 1000 >= max(lengths(parts))
    assert "".join(parts) == text
    # All other words are what they were.
    short = Counter(length for length in lengths([text]) if length <= 1000)
    assert not short - Counter(lengths(parts))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "some words",
        "中文，" * 2000,
        "word " * 2000,
        "a1" * 2000,
        "x" * 1000,
        f"{'x' * 900} {'y' * 900}",
        " \n" * 400,
    ],
)
def test_text_without_long_words_is_given_as_it_is(text: str) -> None:
    assert [*split_long_words([text], _WORDS)] == [text]


def test_ordinary_text_gives_the_same_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [*make_documents(100), "中文，" * 2000, "word " * 2000]
    config = TokenizerConfig(vocab_size=400)
    (tmp_path / "other").mkdir()
    made = install_tokenizer(config, documents, 0, tmp_path)
    monkeypatch.setattr(tokenizer_module, "split_long_words", lambda texts, _: texts)
    assert install_tokenizer(config, documents, 0, tmp_path / "other").read_bytes() == made.read_bytes()


def test_the_trainer_gets_no_long_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []

    def record(texts: object, words: object) -> list[str]:
        given.extend(split_long_words(texts, words))  # type: ignore[arg-type]
        return given

    monkeypatch.setattr(tokenizer_module, "split_long_words", record)
    install_tokenizer(TokenizerConfig(vocab_size=300), [*make_documents(20), _LETTERS], 0, tmp_path)
    assert max(chain([0], lengths(given))) <= 1000
    assert sum(map(len, given)) == sum(map(len, make_documents(20))) + len(_LETTERS)
