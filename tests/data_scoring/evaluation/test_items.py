"""Evaluation items: each original schema becomes the hub's, by hand; what is broken is named, what lacks is counted."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_scoring.evaluation.items import evaluation_texts, read_examples, read_items
from data_scoring.evaluation.tasks import TASKS
from tests.evaluation_data import FILES, write_items

SHARED = Path("../shared/evaldata")
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="needs the samples of public evaluation sets")

# By hand, in the hub's schemas: what lm-eval's definitions read.
_HELLASWAG = {
    "activity_label": "Baking",
    "ctx_a": "A man bakes [header] bread.",
    "ctx_b": "he",
    "endings": ["flies away.", "sings to the oven.", "waits.", "is a loaf of bread."],
    "label": "2",
}
ROWS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "ceval": ({"question": "accountant 0?", "A": "one", "B": "two", "C": "three", "D": "four", "answer": "B"}, [1]),
    "cmmlu": ({"Question": "agronomy 0?", "A": "one", "B": "two", "C": "three", "D": "four", "Answer": "C"}, [2]),
    "mmlu": ({"question": "anatomy 0?", "choices": ["one", "two", "three", "four"], "answer": 3}, [3]),
    "agieval": (
        {
            "query": "Q: Which? Answer Choices: (A)1 (B)2 (C)3 (D)4 (E)5\nA: Among A through E, the answer is",
            "choices": ["(A)1", "(B)2", "(C)3", "(D)4", "(E)5"],
            "gold": [4],
        },
        [4],
    ),
    "boolq": ({"question": "is snow white", "passage": "Snow -- Snow is white.", "label": 1}, [1]),
    "axb": ({"sentence1": "It rains.", "sentence2": "It snows.", "label": 1}, [1]),
    "piqa": ({"goal": "Open a tin", "sol1": "use an opener", "sol2": "use a feather, patiently", "label": 0}, [0]),
    "eprstmt": ({"sentence": "很好", "label": "Positive"}, [1]),
    "xsum": ({"document": "A cat sat on a mat.\nIt slept.", "summary": "The cat slept on the mat"}, []),
    "c3": (
        {"context": ["男：你好。", "女：再见。"], "question": "谁先走?", "choice": ["女的", "男的"], "answer": "女的"},
        [0],
    ),
    "hellaswag_opencompass": (_HELLASWAG, [2]),
    "hellaswag": (_HELLASWAG, [2]),
    "arc_easy_opencompass": (
        {
            "question": "What is cold?",
            "choices": {"text": ["fire", "a hot stone", "a glacier", "tea"], "label": ["1", "2", "3", "4"]},
            "answerKey": "3",
        },
        [2],
    ),
    "arc_easy": (
        {
            "question": "What is hot?",
            "choices": {"text": ["a glacier", "fire", "a stone"], "label": ["A", "B", "C"]},
            "answerKey": "B",
        },
        [1],
    ),
}


@pytest.mark.parametrize("task", TASKS)
def test_an_original_item_becomes_the_hubs_row(task: str, tmp_path: Path) -> None:
    first = read_items(task, write_items(tmp_path))[0]
    expected, gold = ROWS[task]
    assert first.row == expected
    assert TASKS[task].schema.gold(first.row) == gold
    assert first.defect is None


def test_agievals_chinese_and_generated_questions_are_asked_in_its_own_words(tmp_path: Path) -> None:
    items = read_items("agieval", write_items(tmp_path))
    assert [item.subject for item in items] == ["aqua-rat", "jec-qa-ca", "lsat-rc", "gaokao-mathcloze", "math"]
    assert [item.row["query"] for item in items[1:]] == [
        "问题：哪些？ 选项：(A)甲 (B)乙 (C)丙 (D)丁\n答案：从A到D, 我们应选择",
        "A passage. Q: Which? Answer Choices: (A)x (B)y\nA: Among A through B, the answer is",
        "问题：一加一？\n答案：",
        "Q: 3+4?\nA: The answer is",
    ]
    assert items[1].row["gold"] == [0, 2]
    assert [items[index].row["answer"] for index in (3, 4)] == ["$2$", "7"]


@pytest.mark.parametrize(
    ("task", "change", "gold"),
    [
        ("boolq", {"label": True}, 1),
        ("boolq", {"label": False}, 0),
        ("boolq", {"label": 1}, 1),
        ("mmlu", {"answer": "C"}, 2),
        ("mmlu", {"answer": "2"}, 2),
        ("mmlu", {"answer": 2}, 2),
        ("axb", {"label": 0}, 0),
        ("hellaswag", {"label": "3"}, 3),
        ("agieval", {"label": ["B"]}, 1),
    ],
)
def test_other_spellings_of_an_answer(task: str, change: dict[str, Any], gold: int, tmp_path: Path) -> None:
    record = {**FILES[f"{task}.jsonl"][0], **change}
    item = read_items(task, write_items(tmp_path, {f"{task}.jsonl": [record]}))[0]
    assert TASKS[task].schema.gold(item.row) == [gold]


def test_digits_for_letters_three_choices_and_questions_that_share_a_passage(tmp_path: Path) -> None:
    write_items(tmp_path)
    hot, wet = read_items("arc_easy", tmp_path)
    assert (len(hot.row["choices"]["text"]), TASKS["arc_easy"].schema.gold(wet.row)) == (3, [2])
    first, second = read_items("c3", tmp_path)
    assert [first.place, second.place] == ["c3.jsonl:1 question 1", "c3.jsonl:1 question 2"]
    assert (second.row["context"], TASKS["c3"].schema.gold(second.row)) == (first.row["context"], [1])


def test_a_text_may_hold_other_ends_of_lines_and_a_file_a_byte_order_mark(tmp_path: Path) -> None:
    text = json.dumps({"sentence": "一\u2028二\x85三", "label": "Positive"}, ensure_ascii=False)
    (tmp_path / "eprstmt.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n\r\n" + text.encode())
    items = read_items("eprstmt", tmp_path)
    assert [(item.place, item.row["sentence"]) for item in items] == [
        ("eprstmt.jsonl:1", "一\u2028二\x85三"),
        ("eprstmt.jsonl:3", "一\u2028二\x85三"),
    ]


def test_releases_with_a_file_a_subject(tmp_path: Path) -> None:
    """C-Eval's, CMMLU's and MMLU's CSV as they are released, MMLU's without a header, and AGIEval's folder."""
    texts = {
        "ceval/val/accountant_val.csv": 'id,question,A,B,C,D,answer\n0,"two\nlines",1,2,3,"4, 5",D\n',
        "ceval/dev/accountant_dev.csv": "id,question,A,B,C,D,answer,explanation\n0,q,1,2,3,4,A,why\n",
        "cmmlu/test/agronomy.csv": ",Question,A,B,C,D,Answer\n0,q,1,2,3,4,B\n",
        "mmlu/test/anatomy_test.csv": "q,1,2,3,4,C\n",
        "agieval/v1/math.jsonl": json.dumps({"question": "3+4?", "passage": None, "answer": "7"}) + "\n",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    item = read_items("ceval", tmp_path)[0]
    assert (item.subject, item.row["question"], item.row["D"], item.row["answer"]) == (
        "accountant", "two\nlines", "4, 5", "D",
    )  # fmt: skip
    assert read_examples("ceval", tmp_path)[0].subject == "accountant"
    assert read_items("cmmlu", tmp_path)[0].row["Answer"] == "B"
    item = read_items("mmlu", tmp_path)[0]
    assert (item.subject, item.row) == ("anatomy", {"question": "q", "choices": ["1", "2", "3", "4"], "answer": 2})
    item = read_items("agieval", tmp_path)[0]
    assert (item.subject, item.row) == ("math", {"query": "Q: 3+4?\nA: The answer is", "answer": "7"})


@pytest.mark.parametrize(
    ("task", "change", "reason"),
    [
        ("ceval", {"answer": ""}, "no answer"),
        ("ceval", {"answer": None}, "no answer"),
        ("ceval", {"C": None}, "option C is missing"),
        ("ceval", {"question": " "}, "no question"),
        ("mmlu", {"D": float("nan")}, "option D is missing"),
        ("agieval", {"label": None}, "no answer"),
        ("agieval", {"label": []}, "no answer"),
        ("agieval", {"options": None}, "options are missing"),
        ("hellaswag", {"label": ""}, "no answer"),
        ("hellaswag", {"endings": ["a", "", "c", "d"]}, "option B is missing"),
        ("boolq", {"label": None}, "no answer"),
        ("xsum", {"summary": ""}, "no answer"),
        ("arc_easy", {"answerKey": None}, "no answer"),
        ("agieval", {"options": ["(A)1", None, "(C)3"]}, "option B is missing"),
        ("hellaswag", {"endings": ["[step]", "b", "c", "d"]}, "option A is missing"),
        ("mmlu", {"choices": ["a", "b", "c"]}, "options are missing"),
        ("axb", {"sentence2": ""}, "no sentence2"),
        ("boolq", {"question": None}, "no question"),
    ],
)
def test_what_cannot_be_scored_is_kept_with_its_place(
    task: str, change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    good = FILES[f"{task}.jsonl"][0]
    items = read_items(task, write_items(tmp_path, {f"{task}.jsonl": [good, {**good, **change}]}))
    assert [(item.place, item.defect) for item in items] == [(f"{task}.jsonl:1", None), (f"{task}.jsonl:2", reason)]


@pytest.mark.parametrize(
    ("task", "line", "said"),
    [
        ("boolq", "{", r"boolq\.jsonl:2: not valid JSON \(.* at column 2\); repair the line"),
        ("boolq", "3", r"boolq\.jsonl:2: 3 is no item; repair the line"),
        ("boolq", '{"passage": "p", "label": true}', r"boolq\.jsonl:2: no field 'question'; write it"),
        ("boolq", '{"question": 3, "passage": "p", "label": true}', r":2: field 'question' is 3, not a text"),
        ("boolq", '{"question": "q", "passage": "p", "label": "maybe"}', r":2: answer 'maybe' is none of False, True"),
        ("ceval", json.dumps({**FILES["ceval.jsonl"][0], "answer": "E"}), r":2: answer 'E' is none of the options"),
        ("ceval", '{"question": "q"}', r":2: no field 'subject'; write it"),
        ("agieval", json.dumps({**FILES["agieval.jsonl"][2], "label": "C"}), r":2: answer \[2\] is none of the 2 opt"),
        (
            "arc_easy",
            json.dumps({**FILES["arc_easy.jsonl"][0], "answerKey": "D"}),
            r":2: answer 'D' is none of the opt",
        ),
        ("c3", '{"question": "q"}', r"c3\.jsonl:2: not a list of \[lines of the passage, questions, id\]"),
        ("c3", '[["p"], ["q"], "id"]', r"c3\.jsonl:2: a question is no object of question, choice and answer"),
        ("eprstmt", '{"sentence": "s", "label": "Neutral"}', r":2: answer 'Neutral' is none of the options"),
        (
            "hellaswag",
            json.dumps({**FILES["hellaswag.jsonl"][0], "label": 4}),
            r":2: answer '4' is none of the options",
        ),
        (
            "hellaswag",
            json.dumps({**FILES["hellaswag.jsonl"][0], "endings": 4}),
            r":2: field 'endings' is 4, not a list",
        ),
        (
            "hellaswag",
            json.dumps({**FILES["hellaswag.jsonl"][0], "endings": ["a", 3, "c", "d"]}),
            r":2: field 'endings' holds 3, not a text",
        ),
        ("piqa", '{"goal": "g", "sol1": 5, "sol2": "b"}', r"piqa\.jsonl:2: option A is 5, not a text"),
        ("ceval", json.dumps({**FILES["ceval.jsonl"][0], "C": 12}), r":2: option C is 12, not a text"),
        ("mmlu", json.dumps({**FILES["mmlu.jsonl"][0], "choices": [*"abcde"]}), r":2: 5 options, and 4 are asked"),
        ("c3", '[["p"], [{"question": "q", "choice": "ab", "answer": "a"}], "i"]', r":2: field 'choice' is 'ab', not"),
        ("xsum", '{"document": "d", "summary": 5}', r"xsum\.jsonl:2: answer 5 is no text"),
        ("agieval", json.dumps({**FILES["agieval.jsonl"][4], "answer": 7}), r":2: answer 7 is no text"),
        ("eprstmt", '{"sentence": "a\\ud800b", "label": "Positive"}', r":2: holds half of a surrogate pair"),
    ],
)
def test_a_broken_line_is_named(task: str, line: str, said: str, tmp_path: Path) -> None:
    write_items(tmp_path)
    file = tmp_path / f"{task}.jsonl"
    file.write_text(json.dumps(FILES[file.name][0]) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=said) as error:
        read_items(task, tmp_path)
    assert str(error.value).startswith(f"{file}:2")
    assert "\n" not in str(error.value)


def test_missing_and_misaligned_files_are_named(tmp_path: Path) -> None:
    write_items(tmp_path)
    (tmp_path / "boolq.jsonl").unlink()
    with pytest.raises(ValueError, match=r"no file \S*/boolq\.jsonl, which boolq needs"):
        read_items("boolq", tmp_path)
    (tmp_path / "mmlu_dev_hf.jsonl").unlink()
    with pytest.raises(ValueError, match=r"mmlu_dev\.jsonl or \S*/mmlu_dev_hf\.jsonl or \S*/mmlu/dev/\*_dev\.csv"):
        read_examples("mmlu", tmp_path)
    (tmp_path / "piqa-labels.lst").write_text("0\n")
    with pytest.raises(ValueError, match=r"piqa-labels\.lst: 1 labels for the 2 items of piqa\.jsonl"):
        read_items("piqa", tmp_path)
    (tmp_path / "piqa-labels.lst").unlink()
    with pytest.raises(ValueError, match=r"no file \S*/piqa-labels\.lst, which has the answers to piqa\.jsonl"):
        read_items("piqa", tmp_path)
    (tmp_path / "xsum.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"holds no item of xsum"):
        read_items("xsum", tmp_path)
    (tmp_path / "c3.jsonl").write_bytes(b'[["\xff"], [], ""]')
    with pytest.raises(ValueError, match=r"c3\.jsonl:1: not UTF-8"):
        read_items("c3", tmp_path)


def test_texts_hold_passage_question_and_options(tmp_path: Path) -> None:
    write_items(tmp_path, {"boolq.jsonl": [{**FILES["boolq.jsonl"][0], "label": None}]})
    texts = {
        (text.task, text.item): text.text for text in evaluation_texts(["boolq", "c3", "agieval", "xsum"], tmp_path)
    }
    # What cannot be scored is text all the same.
    assert texts["boolq", "boolq.jsonl:1"] == "Snow -- Snow is white.\nis snow white\nno\nyes"
    assert texts["c3", "c3.jsonl:1 question 1"] == "男：你好。\n女：再见。\n谁先走?\n女的\n男的"
    assert texts["agieval", "agieval.jsonl:1"] == "Q: Which?\n(A)1\n(B)2\n(C)3\n(D)4\n(E)5"
    assert texts["agieval", "agieval.jsonl:5"] == "Q: 3+4?\n7"
    assert texts["xsum", "xsum.jsonl:2"] == "Rain fell.\nIt rained"
    assert len(texts) == 1 + 2 + 5 + 2


@needs_shared
def test_the_public_samples_are_read_whole() -> None:
    """Counts and answers as the samples' own description has them (its table), counted there by hand."""
    golds = {task: [TASKS[task].schema.gold(item.row) for item in read_items(task, SHARED)] for task in TASKS}
    assert {task: len(found) for task, found in golds.items()} == {
        "ceval": 208, "cmmlu": 201, "mmlu": 228, "agieval": 210, "boolq": 200, "axb": 200, "piqa": 200,
        "eprstmt": 200, "xsum": 200, "c3": 298, "arc_easy_opencompass": 50, "hellaswag_opencompass": 200,
        "hellaswag": 200, "arc_easy": 200,
    }  # fmt: skip
    defects = [(task, item.defect) for task in TASKS for item in read_items(task, SHARED) if item.defect is not None]
    assert defects == [("arc_easy_opencompass", "5 options; the task scores items of 4")]
    assert Counter(gold for (gold,) in golds["boolq"]) == {1: 127, 0: 73}
    assert Counter(gold for (gold,) in golds["axb"]) == {1: 106, 0: 94}
    assert Counter(gold for (gold,) in golds["eprstmt"]) == {1: 83, 0: 117}
    assert Counter(len(item.row["choice"]) for item in read_items("c3", SHARED)) == {4: 240, 3: 37, 2: 21}
    # Read in the files: answer "1" of mmlu's first, D of C-Eval's, B of CMMLU's, A and D of AGIEval's line 94, …
    firsts = {task: found[0] for task, found in golds.items()}
    assert firsts == {
        "ceval": [3], "cmmlu": [1], "mmlu": [1], "agieval": [0], "boolq": [0], "axb": [1], "piqa": [0],
        "eprstmt": [0], "xsum": [], "c3": [2], "arc_easy_opencompass": [0], "hellaswag_opencompass": [3],
        "hellaswag": [3], "arc_easy": [0],
    }  # fmt: skip
    assert golds["agieval"][93] == [0, 3]
    assert golds["arc_easy"][:1] == [[0]]
    assert [len(read_examples(task, SHARED)) for task in ("ceval", "cmmlu", "mmlu")] == [260, 335, 285]
