"""Searching a corpus for evaluation items: speed against tokenising it and against sets of tuples, and memory."""

import json
import random
import re
import tracemalloc
import unicodedata
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import measure_in_turns, ratio
from data_scoring.base.engine import LocalEngine
from data_scoring.base.progress import silent
from data_scoring.config import CorpusConfig, SourceConfig, TokenizerConfig
from data_scoring.contamination.contaminated_samples import (
    contaminated_items_path,
    contamination_path,
    write_contamination,
)
from data_scoring.corpus.corpus import Corpus
from data_scoring.corpus.prepare_corpus import prepare_corpus
from data_scoring.corpus.python_text import read_python_text
from data_scoring.corpus.reading_order import ReadingOrder
from data_scoring.evaluation.items import ItemText
from data_scoring.tokenizer.tokenizer import open_tokenizer

NUM_ITEMS = 2_000
OVERLAPPING = 20  # items that the corpus holds, one in a hundred
ITEM_WORDS = 80
NGRAM = 13
TURNS = 3
COPIES = 2


def contamination(folder: Path) -> list[dict[str, Any]]:
    """Return the ratios for the text of Python's library, with items from its documentation and a few from the text."""
    documents = [document.text for kind in ("docstrings", "source") for document in read_python_text(kind)]
    items = _draw_items(documents)
    order = _prepare(folder / "once", documents)
    tokenizer = open_tokenizer(order.corpus.tokenizer_path, None)
    encoded = tokenizer.encode_batch(documents)
    size = sum(len(document.encode()) for document in documents)

    def search() -> int:
        _search(order, items)
        return size

    def tokenise() -> int:
        tokenizer.encode_batch(documents)
        return size

    def compare_tuples() -> int:
        _count_by_tuples(tokenizer.decode_batch(encoded), items)
        return size

    contenders = {"looking for items": search, "tokenising": tokenise, "decoding and sets of tuples": compare_tuples}
    speeds = measure_in_turns(contenders, TURNS)
    for name, values in speeds.items():
        print(f"{name}: {max(values) / 1e6:.1f} MB/s (one machine's number; the ratios are the claim)")
    copies = [f"{number} {document}" for number in range(COPIES) for document in documents]
    peaks = [_peak(each, items) for each in (order, _prepare(folder / "more", copies))]
    return [
        ratio(speeds, "looking for items", "tokenising"),
        ratio(speeds, "looking for items", "decoding and sets of tuples"),
        {
            "claim": f"peak memory, {COPIES} times the text / once",
            "median": round(peaks[1] / peaks[0], 3),
            "peak_mb": round(peaks[1] / 1e6),
            "text_mb": round(COPIES * size / 1e6, 1),
        },
    ]


def _draw_items(documents: list[str]) -> list[ItemText]:
    """Return passages as items, `OVERLAPPING` of them from `documents`."""
    generator = random.Random(0)
    others = [document.text for document in read_python_text("topics")]
    items = []
    for number in range(NUM_ITEMS):
        words = generator.choice(documents if number < OVERLAPPING else others).split()
        start = generator.randrange(len(words))
        items.append(ItemText("passages", str(number), " ".join(words[start : start + ITEM_WORDS])))
    return items


def _prepare(folder: Path, documents: list[str]) -> ReadingOrder:
    folder.mkdir()
    path = folder / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    config = CorpusConfig(sources=(SourceConfig(name="text", path=str(path)),), seq_length=1024)
    prepare_corpus(config, TokenizerConfig(vocab_size=8192), 0, folder / "corpus", "bench", silent)
    return ReadingOrder(Corpus(folder / "corpus"), 0)


def _search(order: ReadingOrder, items: list[ItemText]) -> None:
    for path in (contamination_path(order.corpus.folder), contaminated_items_path(order.corpus.folder)):
        path.unlink(missing_ok=True)
    opening = partial(open_tokenizer, order.corpus.tokenizer_path, None)
    write_contamination(order, opening, items, NGRAM, LocalEngine(1), silent)


def _count_by_tuples(documents: list[str], items: list[ItemText]) -> dict[tuple[str, ...], set[int]]:
    """Return the documents that contain each n-gram of `items`, without its position in the corpus."""
    wanted = {ngram for item in items for ngram in _ngrams(item.text)}
    found: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for number, document in enumerate(documents):
        for ngram in _ngrams(document):
            if ngram in wanted:
                found[ngram].add(number)
    return found


def _ngrams(text: str) -> list[tuple[str, ...]]:
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).lower())
    return list(zip(*(words[start:] for start in range(NGRAM)), strict=False))


def _peak(order: ReadingOrder, items: list[ItemText]) -> int:
    tracemalloc.start()
    _search(order, items)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak
