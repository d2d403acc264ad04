"""Items whose options a model cannot tell apart, or cannot see, are listed; the others are asked as before."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from data_scoring.tokenizer.tokenizer import open_tokenizer
from flows.evaluation.harness_requests import Reader, ask
from flows.evaluation.task_loading import EvaluationTask, load_tasks
from tests.data_scoring.tokenizer.tokenizer_kinds import make_kind
from tests.evaluation_data import FILES, write_items

_NOTHING_OF_A = "the tokenizer makes nothing of option A"
_NOTHING_OF_B = "the tokenizer makes nothing of option B"
_SAME = "the tokenizer makes the same of options A and B"
# Endings of items, the first of which any tokenizer can read.
_ENDINGS = [
    ["the text.", "sings.", "waits.", "is bread."],
    ["北", "sings.", "waits.", "is bread."],
    ["北", "京", "waits.", "is bread."],
    ["sings.", "\u200b", "waits.", "is bread."],
    ["sings", "SINGS", "waits.", "is bread."],
    ["same", "same", "same", "same"],
]
# By number of the item; with byte tokens, every character is one or more tokens.
_DROPPED = {2: _NOTHING_OF_A, 3: _NOTHING_OF_A, 4: _NOTHING_OF_B, 5: _NOTHING_OF_B}
_EXPECTED: dict[str, dict[int, str]] = {
    "byte-level": {},
    "byte-level-normalised": {5: _SAME},
    "llama": {},
    "dropping": _DROPPED,
    "dropping-across-words": _DROPPED,
    "metaspace-always": {3: _SAME},
    "unigram": {3: _SAME},
    # These normalise the zero-width space away.
    "sp-bpe-bytes": {4: _NOTHING_OF_B},
    "sp-bpe": {3: _SAME, 4: _NOTHING_OF_B},
    "sp-unigram": {3: _SAME, 4: _NOTHING_OF_B},
    "sp-suffix": {3: _SAME, 4: _NOTHING_OF_B},
    "word-piece": {3: _SAME, 4: _NOTHING_OF_B, 5: _SAME},
}


def asked_of(task: EvaluationTask, reader: Reader) -> tuple[EvaluationTask, dict[int, str]]:
    """Return the task without the items that cannot be scored, and the reason for each, by line of its file."""
    asked = ask(task, reader)
    left = task.without(asked.unscorable)
    assert not ask(left, reader).unscorable
    return left, {int(one.item.rpartition(":")[2].split()[0]): one.reason for one in left.unscorable}


def load(name: str, folder: Path, reader: Reader) -> EvaluationTask:
    [task] = load_tasks([name], folder, None, reader.fits, lambda texts: [1] * len(texts))
    return task


@pytest.mark.parametrize("kind", _EXPECTED)
def test_options_that_are_lost_or_the_same_cannot_be_scored(kind: str, tmp_path: Path) -> None:
    reader = Reader(open_tokenizer(make_kind(kind, tmp_path), None), 4096)
    items = [{**FILES["hellaswag.jsonl"][1], "ctx_a": "the text", "endings": endings} for endings in _ENDINGS]
    folder = write_items(tmp_path / "items", {"hellaswag.jsonl": items})
    task, reasons = asked_of(load("hellaswag", folder, reader), reader)
    expected = _EXPECTED[kind]
    assert reasons == expected
    assert task.samples == {"hellaswag": [number - 1 for number in range(1, 7) if number not in expected]}
    assert (task.chance, task.num_shortened) == (0.25, 0)


@pytest.mark.parametrize(
    ("name", "lost"),
    [("eprstmt", {1: _NOTHING_OF_A, 2: _NOTHING_OF_A}), ("c3", {1: _NOTHING_OF_A}), ("axb", {}), ("piqa", {})],
)
def test_whole_texts_are_checked_as_well(name: str, lost: dict[int, str], tmp_path: Path) -> None:
    folder = write_items(tmp_path / "items")
    for kind, expected in (("byte-level", {}), ("dropping", lost)):
        reader = Reader(open_tokenizer(make_kind(kind, tmp_path), None), 4096)
        task, reasons = asked_of(load(name, folder, reader), reader)
        assert reasons == expected
        assert bool(task.subtasks) is not bool(expected)


def test_items_that_the_tokenizer_cannot_encode_are_listed(tmp_path: Path) -> None:
    letters = sorted({*"".join(str(item) for item in FILES["arc_easy.jsonl"]), *"QuestionAnswer:\n"})
    model = models.Unigram([("</s>", 0.0), *((letter, -2.0) for letter in letters)], unk_id=None)
    Tokenizer(model).save(str(tmp_path / "t.json"))
    good, other = FILES["arc_easy.jsonl"]
    odd: dict[str, Any] = {**other, "question": {**other["question"], "stem": "北京?"}}
    folder = write_items(tmp_path / "items", {"arc_easy.jsonl": [good, odd, other]})
    for length in (4096, 80):
        reader = Reader(open_tokenizer(tmp_path / "t.json", None), length)
        task, reasons = asked_of(load("arc_easy", folder, reader), reader)
        assert reasons == {2: "the tokenizer cannot encode it"}
        assert task.samples == {"arc_easy": [0, 2]}
        assert task.chance == pytest.approx((1 / 3 + 1 / 4) / 2)
    instances = load("arc_easy", folder, reader).subtasks["arc_easy"]
    instances.build_all_requests()
    with pytest.raises(ValueError, match=r"^arc_easy: item 1: the tokenizer cannot encode it; leave it out$"):
        reader.read(instances.instances).respond(instances.instances, [])


def test_no_tokenizer_lists_ordinary_items(tmp_path: Path) -> None:
    """Merges of a question's end with an option, and letters as options, are no defects."""
    folder = write_items(tmp_path / "items")
    for kind in ("byte-level", "byte-level-prefix-space", "pattern", "llama", "sp-bpe-bytes", "sp-identity"):
        reader = Reader(open_tokenizer(make_kind(kind, tmp_path), None), 4096)
        for name in ("mmlu", "boolq", "piqa", "hellaswag"):
            _, reasons = asked_of(load(name, folder, reader), reader)
            assert not reasons, (kind, name)
