"""Overlaps of items and training text, compared with a second implementation with sets of tuples and token offsets.

The second implementation reads the text that the corpus was prepared from; the tested code reads the corpus's tokens.
"""

import json
import random
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from data_scoring.base.engine import Engine, LocalEngine
from data_scoring.base.progress import silent
from data_scoring.config import CorpusConfig, SourceConfig, TokenizerConfig
from data_scoring.contamination import item_ngrams, overlaps
from data_scoring.contamination.contaminated_samples import (
    SCRATCH,
    contaminated_items_path,
    contamination_path,
    samples_fingerprint,
    write_contamination,
)
from data_scoring.corpus import reading_order
from data_scoring.corpus.corpus import VALIDATION, Corpus
from data_scoring.corpus.indexed import write_index
from data_scoring.corpus.prepare_corpus import prepare_corpus
from data_scoring.corpus.reading_order import ReadingOrder
from data_scoring.evaluation.items import ItemText
from data_scoring.tokenizer.tokenizer import Tokenizer, open_tokenizer
from tests.conftest import make_documents, read_rows
from tests.data_scoring.contamination.test_ngrams import UNIT, units_of
from tests.data_scoring.odd_engines import DeadlyEngine, TwiceEngine
from tests.data_scoring.tokenizer.tokenizer_kinds import make_kind

SEED = 3
WORDS = [*"abcdefg", *"中文的是。，", "long", "word", "…"]
PAIR = ("task", "item", "shard", "sample", "num_ngrams")
ITEM = ("task", "item", "num_ngrams", "num_found", "num_common", "share", "is_too_short")


def write_source(path: Path, documents: list[str]) -> SourceConfig:
    path.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    return SourceConfig(name=path.stem, path=str(path))


def prepare(folder: Path, sources: list[SourceConfig], seq_length: int = 15, vocab_size: int = 270) -> ReadingOrder:
    """Prepare a corpus that holds one document out."""
    config = CorpusConfig(sources=tuple(sources), seq_length=seq_length, num_shards=3, validation_fraction=1e-9)
    prepare_corpus(config, TokenizerConfig(vocab_size=vocab_size), SEED, folder / "corpus", "prepared", silent)
    return ReadingOrder(Corpus(folder / "corpus"), SEED)


def tokenizer_of(order: ReadingOrder) -> Tokenizer:
    return open_tokenizer(order.corpus.tokenizer_path, None)


def write(order: ReadingOrder, items: list[ItemText], ngram: int = 13, engine: Engine | None = None) -> bool:
    opening = partial(open_tokenizer, order.corpus.tokenizer_path, None)
    return write_contamination(order, opening, items, ngram, engine or LocalEngine(1), silent)


def trained_on(order: ReadingOrder, documents: list[str]) -> list[str]:
    """Return the documents without the ones that are held out, by the text of the validation set."""
    samples = np.arange(order.corpus.num_validation_samples)
    batch = order.corpus.read(np.full(len(samples), VALIDATION), samples)
    ids = [int(t) for row, size in zip(batch.tokens, batch.num_tokens, strict=True) for t in row[: size + 1]]
    held_out = tokenizer_of(order).decode(ids)
    return [document for document in documents if document not in held_out]


def samples_by_content(order: ReadingOrder) -> dict[tuple[int, ...], tuple[int, int]]:
    """Return the place of each sample by its tokens, without samples whose tokens are those of another."""
    corpus = order.corpus
    places = defaultdict(list)
    for shard in range(corpus.num_shards):
        for sample in range(corpus.num_samples(shard)):
            batch = corpus.read(np.array([shard]), np.array([sample]))
            places[tuple(batch.tokens[0, : batch.num_tokens[0] + 1].tolist())].append((shard, sample))
    return {content: same[0] for content, same in places.items() if len(same) == 1}


Found = dict[tuple[str, ...], list[tuple[int, set[tuple[int, int]]]]]


def brute_force(order: ReadingOrder, sources: list[list[str]], ngram: int) -> Found:
    """Return, for each n-gram of `ngram` units, of shorter ones too, the documents that have it, with the samples."""
    encoder = tokenizers.Tokenizer.from_file(str(order.corpus.tokenizer_path))
    end, length = order.corpus.manifest["end_of_document"], order.sample_length
    places = samples_by_content(order)
    found: Found = defaultdict(list)
    number = 0
    for documents in sources:
        stream: list[int] = []
        ngrams = []
        for document in documents:
            encoding = encoder.encode(document, add_special_tokens=False)
            last_token = {place: token for token, (a, b) in enumerate(encoding.offsets) for place in range(a, b)}
            words = [(match.group(), len(stream) + last_token[match.start()]) for match in UNIT.finditer(document)]
            for size in range(min(8, ngram), ngram + 1):
                for start in range(len(words) - size + 1):
                    part = words[start : start + size]
                    ngrams.append((tuple(word for word, _ in part), number, part[0][1], part[-1][1]))
            stream += [*encoding.ids, end]
            number += 1
        windows = [places.get(tuple(stream[at : at + length])) for at in range(0, len(stream), length)]
        for name, document, first, last in ngrams:
            held = {window for window in windows[first // length : last // length + 1] if window is not None}
            if found[name] and found[name][-1][0] == document:
                found[name][-1][1].update(held)
            else:
                found[name].append((document, held))
    return found


def expect(items: list[ItemText], found: Found, ngram: int) -> tuple[list[tuple], list[tuple]]:
    """Return the rows of pairs and of items, as `PAIR` and `ITEM` name their columns."""
    pairs, rows = [], []
    for item in items:
        words = units_of(item.text)
        size = min(ngram, len(words))
        names = (
            {tuple(words[at : at + size]) for at in range(len(words) - size + 1)} if size >= min(8, ngram) else set()
        )
        listed = {name: found[name] for name in names if 0 < len(found.get(name, [])) <= 10}
        common = sum(len(found.get(name, [])) > 10 for name in names)
        samples: dict[tuple[int, int], int] = defaultdict(int)
        for documents in listed.values():
            for place in set().union(*(held for _, held in documents)):
                samples[place] += 1
        pairs += [(item.task, item.item, *place, count) for place, count in samples.items()]
        share = len(listed) / len(names) if names else None
        rows.append((item.task, item.item, len(names), len(listed), common, share, not names))
    return sorted(pairs), sorted(rows, key=lambda row: row[:2])


def random_text(generator: random.Random, least: int, most: int) -> str:
    return " ".join(generator.choices(WORDS, k=generator.randint(least, most)))


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> tuple[ReadingOrder, list[list[str]]]:
    """A corpus of two sources of random words, in which many n-grams come again, with the text that it holds."""
    return prepare_noisy(tmp_path_factory.mktemp("noisy"))


def prepare_noisy(folder: Path) -> tuple[ReadingOrder, list[list[str]]]:
    """Return a corpus of two sources in `folder`, in which many n-grams come again, with the text that it holds."""
    generator = random.Random(0)
    common = random_text(generator, 12, 12)
    texts = [[f"{n} {random_text(generator, 20, 300)}" for n in range(count)] for count in (40, 25)]
    texts = [[f"{text} {common}" if n % 3 == 0 else text for n, text in enumerate(part)] for part in texts]
    # A sentence of documents that are next to each other, and of one of them twice.
    twice = random_text(generator, 20, 20)
    texts[0][7] += f" {twice} and {twice}"
    texts[0][8] = f"8 {twice}"
    sources = [write_source(folder / f"{name}.jsonl", part) for name, part in zip("xy", texts, strict=True)]
    order = prepare(folder, sources)
    return order, [trained_on(order, part) for part in texts]


def draw_items(texts: list[list[str]]) -> list[ItemText]:
    """Return items of random words, items with passages of `texts`, and one with a common phrase."""
    generator = random.Random(1)
    items = [ItemText("random", f"{n:03d}", random_text(generator, 3, 40)) for n in range(60)]
    for n in range(20):
        words = generator.choice(texts[n % 2]).upper().split()
        at = generator.randrange(len(words))
        items.append(ItemText("copied", f"{n:03d}", f"new words {'! '.join(words[at : at + 25])}, before"))
    items.append(ItemText("common", "0", texts[1][3]))
    return items


@pytest.mark.parametrize("ngram", [5, 10])
def test_overlaps_are_those_of_sets_of_tuples(
    noisy: tuple[ReadingOrder, list[list[str]]], ngram: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, texts = noisy
    # One document of each source is held out.
    assert sum(map(len, texts)) == 63
    # Blocks, chunks and pieces much smaller than the text; what remains of a piece is longer than the n-grams.
    monkeypatch.setattr(reading_order, "_CHUNK_TOKENS", 300)
    monkeypatch.setattr(overlaps, "_PIECE_TOKENS", 256)
    monkeypatch.setattr(overlaps, "_TOKENS_PER_UNIT", 8)
    monkeypatch.setattr(item_ngrams, "_CHUNK_CHARACTERS", 500)
    items = draw_items(texts)
    assert write(order, items, ngram)
    pairs, rows = expect(items, brute_force(order, texts, ngram), ngram)
    known = set(samples_by_content(order).values())
    found = read_rows(contamination_path(order.corpus.folder), *PAIR)
    assert [row for row in found if row[2:4] in known] == pairs
    assert len(found) - len(pairs) < 10
    assert sorted(read_rows(contaminated_items_path(order.corpus.folder), *ITEM), key=lambda row: row[:2]) == rows
    # What is compared is there at all.
    assert len(pairs) > 30
    assert sum(row[4] for row in rows) > 0
    assert 2 < sum(row[6] for row in rows) < 30


def files_of(order: ReadingOrder) -> list[bytes]:
    """Return the content of the files that were written, and remove them."""
    paths = (contamination_path(order.corpus.folder), contaminated_items_path(order.corpus.folder))
    content = [path.read_bytes() for path in paths]
    for path in paths:
        path.unlink()
    return content


def in_place(order: ReadingOrder, folder: Path) -> ReadingOrder:
    """Return the same text as a corpus that is used in place, of which samples are held out."""
    streams = {name: np.concatenate(list(order.blocks(number))) for number, name in enumerate(order.sources)}
    return use_in_place(streams, order, folder)


def use_in_place(streams: dict[str, np.ndarray], order: ReadingOrder, folder: Path) -> ReadingOrder:
    """Return a corpus that uses the sources `streams` in place, with the tokenizer of `order`."""
    sources = []
    for name, stream in streams.items():
        tokens = stream.astype(np.uint16)
        (folder / f"{name}.bin").write_bytes(tokens.tobytes())
        write_index(folder / f"{name}.idx", tokens.dtype, 1, [(np.array([len(tokens)]), np.array([0]))])
        sources.append(SourceConfig(name=name, path=str(folder / name), format="megatron"))
    config = CorpusConfig(sources=tuple(sources), seq_length=15, num_shards=3, validation_fraction=0.1)
    tokenizer = TokenizerConfig(path=str(order.corpus.tokenizer_path))
    prepare_corpus(config, tokenizer, SEED, folder / "corpus", "prepared", silent)
    return ReadingOrder(Corpus(folder / "corpus"), SEED)


@pytest.mark.parametrize("is_in_place", [False, True])
def test_the_files_are_the_same_however_the_text_is_divided(
    noisy: tuple[ReadingOrder, list[list[str]]],
    tmp_path: Path,
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    is_in_place: bool,
) -> None:
    prepared, texts = noisy
    order, items = in_place(prepared, tmp_path) if is_in_place else prepared, draw_items(texts)
    assert order.is_in_place == is_in_place
    write(order, items, 5, engine)
    found = read_rows(contaminated_items_path(order.corpus.folder), *ITEM)
    if not is_in_place:
        _, rows = expect(items, brute_force(order, texts, 5), 5)
        assert sorted(found, key=lambda row: row[:2]) == rows
    assert sum(row[3] for row in found) > 30
    assert sum(row[4] for row in found) > 0
    whole = files_of(order)
    end, ends = order.corpus.manifest["end_of_document"], []
    for source in range(2):
        ends.append(np.flatnonzero(np.concatenate(list(order.blocks(source))) == end))
    # Parts that are shorter than documents, that begin with one, or that have many.
    for size in (60, int(ends[0][3]) + 1, int(ends[1][5]), 3000):
        monkeypatch.setattr(overlaps, "_PART_TOKENS", size)
        # In parts as short as these, most documents go on in the next one.
        assert size != 60 or np.diff(ends[0]).mean() > 2 * size
        write(order, items, 5, engine)
        assert files_of(order) == whole
    assert not (order.corpus.folder / SCRATCH).exists()


@pytest.mark.parametrize("num_documents", [10, 11])
def test_documents_at_which_parts_begin_are_counted_once(
    noisy: tuple[ReadingOrder, list[list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_documents: int
) -> None:
    item = ItemText("t", "0", " ".join(WORDS[n % 7] for n in range(20)))
    tokenizer, end = tokenizer_of(noisy[0]), noisy[0].corpus.manifest["end_of_document"]
    document = [*tokenizer.encode_batch([f"{item.text}."])[0], end]
    order = use_in_place({"x": np.array(document * num_documents)}, noisy[0], tmp_path)
    for size in (len(document), len(document) - 1, len(document) + 1, 2 * len(document), 3, 1 << 20):
        monkeypatch.setattr(overlaps, "_PART_TOKENS", size)
        write(order, [item])
        [(found, common)] = read_rows(contaminated_items_path(order.corpus.folder), "num_found", "num_common")
        assert (found > 0, common > 0) == (num_documents == 10, num_documents == 11)
        files_of(order)


def test_a_rerun_after_a_lost_worker_has_the_same_result_if_all_is_done_twice(
    noisy: tuple[ReadingOrder, list[list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, items = noisy[0], draw_items(noisy[1])
    write(order, items)
    whole = files_of(order)
    monkeypatch.setattr(overlaps, "_PART_TOKENS", 2000)
    with (
        DeadlyEngine(2, tmp_path / "killed") as engine,
        pytest.raises(ValueError, match="a process of the pool was killed"),
    ):
        write(order, items, engine=engine)
    assert (order.corpus.folder / SCRATCH).exists()
    with TwiceEngine() as engine:
        write(order, items, engine=engine)
    assert files_of(order) == whole
    assert not (order.corpus.folder / SCRATCH).exists()


def test_what_is_planted_is_found_and_nothing_else(tmp_path: Path) -> None:
    generator = random.Random(5)
    english = [f"w{n}" for n in range(3000)]
    chinese = [chr(0x4E00 + n) for n in range(3000)]

    def changed(text: str) -> str:
        return text.upper().replace(" ", " -- ")

    def write_words(words: list[str], joint: str, count: int) -> str:
        return joint.join(generator.choices(words, k=count))

    ways: list[Callable[[str], str]] = [str, changed]
    items, documents, planted = [], [], set()
    for number in range(40):
        words, joint = ((english, " "), (chinese, ""))[number % 2]
        text = write_words(words, joint, 30)
        items.append(ItemText("t", str(number), text))
        before, after = (write_words(words, joint, generator.randint(0, 60)) for _ in range(2))
        if number < 20:
            planted.add(str(number))
            # Full stops that are as wide as the characters around them do not part Chinese sentences from others.
            text = "，".join(text) if joint == "" else ways[number // 2 % 2](text)
        else:
            # One word less than it takes.
            text = joint.join(text.split()[:12]) if joint else text[:12]
        documents.append(f"{before}.{text}.{after}")
    order = prepare(tmp_path, [write_source(tmp_path / "a.jsonl", documents)])
    kept = trained_on(order, documents)
    planted -= {str(number) for number, document in enumerate(documents) if document not in kept}
    assert write(order, items)
    rows = read_rows(contaminated_items_path(order.corpus.folder), "item", "num_ngrams", "num_found", "share")
    assert {row[0] for row in rows if row[2]} == planted
    assert {row[1:] for row in rows if row[0] in planted} == {(18, 18, 1.0)}
    # Samples are shorter than items, so that all of these go across borders.
    pairs = read_rows(contamination_path(order.corpus.folder), "item", "shard", "sample", "excerpt")
    assert min(sum(row[0] == item for row in pairs) for item in planted) > 1
    text = next(item.text for item in items if item.item == "0")
    assert " ".join(text.split()[:13]) in {row[3] for row in pairs if row[0] == "0"}


def phrase(name: str, count: int = 13) -> str:
    return " ".join(f"{name}{n}" for n in range(count))


def test_a_phrase_of_more_than_ten_documents_is_boilerplate(tmp_path: Path) -> None:
    sizes = range(8, 14)
    texts = [" ".join([str(n), *(phrase(f"of{size}x") for size in sizes if n < size)]) for n in range(14)]
    order = prepare(tmp_path, [write_source(tmp_path / "a.jsonl", texts)], seq_length=63)
    items = [ItemText("t", str(size), phrase(f"of{size}x")) for size in sizes]
    write(order, [*items, ItemText("t", "none", phrase("none"))])
    trained = trained_on(order, texts)
    counts = {item.item: sum(item.text in text for text in trained) for item in items}
    # One document is held out, so that at the most one phrase fewer is in as many.
    assert {10, 11} <= set(counts.values())
    expected = {item: (int(count <= 10), int(count > 10)) for item, count in counts.items()}
    rows = read_rows(contaminated_items_path(order.corpus.folder), "item", "num_found", "num_common")
    assert {row[0]: row[1:] for row in rows} == {**expected, "none": (0, 0)}


def test_a_long_document_is_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_order, "_CHUNK_TOKENS", 300)
    monkeypatch.setattr(overlaps, "_PIECE_TOKENS", 600)
    once = phrase("once")
    texts = ["".join(f"{once} {phrase(f'other{n}x', 30)} " for n in range(20)), f"{once} other", phrase("more", 30)]
    order = prepare(tmp_path, [write_source(tmp_path / "a.jsonl", texts)])
    assert texts[0] in trained_on(order, texts)
    write(order, [ItemText("t", "once", once)])
    [row] = read_rows(contaminated_items_path(order.corpus.folder), "num_found", "num_common")
    assert row == (1, 0)


def test_half_a_word_where_a_document_is_cut_is_no_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlaps, "_PIECE_TOKENS", 100)
    monkeypatch.setattr(overlaps, "_TOKENS_PER_UNIT", 8)
    # Every byte is a token: the first piece ends with the w of word, the second begins with the d of bad.
    text = f"{'-' * 58}bad r1 r2 r3 r4{'-' * 14}q1 q2 q3 q4 word and more"
    assert (text[99], text[60]) == ("w", "d")
    order = prepare(tmp_path, [write_source(tmp_path / "a.jsonl", [text, "other " * 20, "more " * 20])], vocab_size=257)
    assert text in trained_on(order, [text])
    wanted = ["q1 q2 q3 q4 w", "q1 q2 q3 q4 word", "d r1 r2 r3 r4", "bad r1 r2 r3 r4"]
    write(order, [ItemText("t", each, each) for each in wanted], 5)
    rows = read_rows(contaminated_items_path(order.corpus.folder), "item", "num_found")
    assert [row[0] for row in rows if row[1]] == ["bad r1 r2 r3 r4", "q1 q2 q3 q4 word"]


def test_nothing_is_done_again_until_something_changes(tmp_path: Path) -> None:
    texts = [" ".join(f"{letter}{n}" for n in range(20)) for letter in "abcd"]
    order = prepare(tmp_path, [write_source(tmp_path / "a.jsonl", texts)])
    corpus = order.corpus
    [text, *_] = trained_on(order, texts)
    one, other = ItemText("t", "1", text), ItemText("t", "2", "x y " * 7)
    assert samples_fingerprint(corpus.folder, corpus.fingerprint, 13) is None
    assert write(order, [one])
    path = contamination_path(corpus.folder)
    written = path.stat().st_mtime_ns
    assert not write(order, [one])
    assert path.stat().st_mtime_ns == written
    first = samples_fingerprint(corpus.folder, corpus.fingerprint, 13)
    # Another item that overlaps with nothing changes nothing of what a mix leaves out.
    assert write(order, [one, other])
    assert samples_fingerprint(corpus.folder, corpus.fingerprint, 13) == first
    assert write(order, [other])
    assert samples_fingerprint(corpus.folder, corpus.fingerprint, 13) != first
    assert samples_fingerprint(corpus.folder, corpus.fingerprint, 12) is None
    assert samples_fingerprint(corpus.folder, "of another corpus", 13) is None
    contaminated_items_path(corpus.folder).unlink()
    assert write(order, [other])
    assert write(order, [ItemText("t", "short", "too short to tell")])
    assert read_rows(contaminated_items_path(corpus.folder), *ITEM) == [("t", "short", 0, 0, 0, None, True)]
    with pytest.raises(ValueError, match=r"eval\.contamination: there are no items to look for"):
        write(order, [])


@pytest.mark.parametrize(
    "kind",
    ["byte-level", "byte-level-normalised", "dropping", "metaspace-always", "word-piece", "sp-bpe", "sp-unigram"],
)
def test_items_are_found_whatever_the_tokenizer_leaves_of_their_text(kind: str, tmp_path: Path) -> None:
    """Every n-gram of the item has a character that some tokenizers drop, replace or normalise."""
    item = ItemText("t", "a:1", " ".join("the text of a Naïve modél 北 shows ŝuch Löss in one" for _ in range(3)))
    odd = [*make_documents(60), f"before that {item.text} and after", f"again {item.text} here"]
    source = write_source(tmp_path / "a.jsonl", odd)
    tokenizer = TokenizerConfig(path=str(make_kind(kind, tmp_path)))
    config = CorpusConfig(sources=(source,), seq_length=15, num_shards=1, validation_fraction=1e-9)
    prepare_corpus(config, tokenizer, SEED, tmp_path / "corpus", "prepared", silent)
    order = ReadingOrder(Corpus(tmp_path / "corpus"), SEED)
    other = ItemText("t", "a:2", "nothing of the kind is written in any of these many documents")
    assert write(order, [item, other], 13)
    found = read_rows(contaminated_items_path(order.corpus.folder), "item", "share")
    assert found == [("a:1", 1.0), ("a:2", 0.0)]
