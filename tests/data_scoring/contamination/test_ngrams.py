"""Units compared with hand-written ones and a regular expression; hashes of n-grams compared with tuples of strings."""

import random
import re
import tracemalloc
import unicodedata

from data_scoring.contamination.item_ngrams import index_items
from data_scoring.contamination.ngrams import hash_ngrams, split_units
from data_scoring.evaluation.items import ItemText

# Words, or single characters of Han and kana.
UNIT = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")


def units_of(text: str) -> list[str]:
    return UNIT.findall(unicodedata.normalize("NFKC", text).lower())


def split(texts: list[str]) -> list[list[str]]:
    units = split_units(texts)
    spans = list(zip(units.starts, units.ends, units.owners, strict=True))
    return [[units.text[start:end] for start, end, owner in spans if owner == number] for number in range(len(texts))]


def test_what_a_unit_is() -> None:
    texts = ["The Cat's “out”—№ ３.14!", "", "…", "他说：ＯＫ、行。カタカナ", "snake_case a\0b", "हिन्दी भाषा", "ไทย"]
    assert split(texts) == [
        ["the", "cat", "s", "out", "no", "3", "14"],
        [],
        [],
        ["他", "说", "ok", "行", "カ", "タ", "カ", "ナ"],
        ["snake", "case", "a", "b"],
        ["हिन्दी", "भाषा"],
        ["ไ", "ท", "ย"],
    ]
    assert split([]) == []


def test_units_of_any_text_are_those_of_a_regular_expression() -> None:
    generator = random.Random(0)
    characters = [*"aB9_ .,'-\n", *"éßİÆ", *"中文的。，（）ＡＢ９", *"かナー", *"αΩж"]
    texts = ["".join(generator.choices(characters, k=generator.randint(0, 60))) for _ in range(300)]
    # ー and the dot that is left of İ in lower case are no letters to Python's expressions.
    texts = [text.replace("ー", "").replace("İ", "I") for text in texts]
    assert split(texts) == [units_of(text) for text in texts]


def test_equal_hashes_are_equal_ngrams() -> None:
    generator = random.Random(1)
    texts = [" ".join(generator.choices(["a", "b", "ab", "ba", "中"], k=30)) for _ in range(40)]
    units = split_units(texts)
    spelled = [units.text[start:end] for start, end in zip(units.starts, units.ends, strict=True)]
    names: dict[int, tuple[str, ...]] = {}
    hashes: dict[tuple[str, ...], int] = {}
    for length, values, is_within in hash_ngrams(units, {2, 5, 8}):
        assert len(values) == len(spelled) - length + 1
        assert is_within.sum() == sum(len(words) - length + 1 for words in map(units_of, texts))
        for place, value in enumerate(values.tolist()):
            ngram = tuple(spelled[place : place + length])
            assert names.setdefault(value, ngram) == ngram
            assert hashes.setdefault(ngram, value) == value
    assert {len(ngram) for ngram in hashes} == {2, 5, 8}


def test_items_have_as_many_ngrams_as_tuples_tell() -> None:
    generator = random.Random(2)
    items = [
        ItemText("t", str(number), " ".join(generator.choices("abcd", k=generator.randint(0, 40))))
        for number in range(200)
    ]
    index = index_items(items, 13)
    for number, item in enumerate(items):
        words = units_of(item.text)
        length = min(13, len(words))
        expected: dict[tuple[str, ...], int] = {}
        if len(words) >= 8:
            for place in range(len(words) - length + 1):
                expected.setdefault(tuple(words[place : place + length]), place)
        assert sorted(index.places[index.owners == number].tolist()) == sorted(expected.values())
    assert index.distinct.lengths == set(range(8, 14))


def test_nothing_is_kept_of_long_words() -> None:
    split_units(["warm up"])
    tracemalloc.start()
    for length in range(100_000, 100_030):
        split_units(["a" * length])
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A word's powers take 800 kB.
    assert kept < 400_000
