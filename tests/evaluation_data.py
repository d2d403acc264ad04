"""A tiny evaluation folder: made-up items of all tasks, in the data sets' original schemas, quirks included."""

import json
from pathlib import Path
from typing import Any

_EXAM = {"A": "one", "B": "two", "C": "three", "D": "four"}


def _exam(subject: str, number: int, letter: str, question: str = "question", answer: str = "answer") -> dict[str, Any]:
    return {"subject": subject, question: f"{subject} {number}?", **_EXAM, answer: letter}


def _agieval(task: str, options: list[str] | None, label: Any, **more: Any) -> dict[str, Any]:
    return {"task": task, "passage": None, "question": "Which?", "options": options, "label": label, **more}


FILES: dict[str, list[Any]] = {
    "ceval.jsonl": [_exam("accountant", 0, "B"), _exam("accountant", 1, "D"), _exam("logic", 0, "A")],
    "ceval_dev.jsonl": [
        {**_exam(subject, number, "ABCD"[number % 4]), "explanation": "because"}
        for subject in ("accountant", "logic")
        for number in range(10, 15)
    ],
    # The CSV's index has an empty header.
    "cmmlu.jsonl": [{"": "0", **_exam("agronomy", 0, "C", "Question", "Answer")}],
    "cmmlu_dev.jsonl": [{"": str(n), **_exam("agronomy", n, "B", "Question", "Answer")} for n in range(5)],
    "mmlu.jsonl": [_exam("anatomy", 0, "3"), _exam("anatomy", 1, "0")],
    "mmlu_dev_hf.jsonl": [
        {"question": f"anatomy {n}?", "subject": "anatomy", "choices": [*_EXAM.values()], "answer": n % 4}
        for n in range(5)
    ],
    "agieval.jsonl": [
        _agieval("aqua-rat", ["(A)1", "(B)2", "(C)3", "(D)4", "(E)5"], "E", answer=None, other={"solution": "x"}),
        {**_agieval("jec-qa-ca", ["(A)甲", "(B)乙", "(C)丙", "(D)丁"], ["A", "C"]), "question": "哪些？"},
        {**_agieval("lsat-rc", ["(A)x", "(B)y"], "A"), "passage": "A passage. "},
        {**_agieval("gaokao-mathcloze", None, None, answer="$2$"), "question": "一加一？"},
        {**_agieval("math", None, None, answer="7"), "question": "3+4?"},
    ],
    "boolq.jsonl": [
        {"question": "is snow white", "passage": "Snow -- Snow is white.", "idx": 0, "label": "true"},
        {"question": "is snow black", "passage": "Snow -- Snow is white.", "idx": 1, "label": "false"},
    ],
    "axb.jsonl": [
        {"idx": "0", "label": "not_entailment", "sentence1": "It rains.", "sentence2": "It snows.", "logic": "Not"},
        {"idx": "1", "label": "entailment", "sentence1": "It rains a lot.", "sentence2": "It rains."},
    ],
    "piqa.jsonl": [
        {"goal": "Open a tin", "sol1": "use an opener", "sol2": "use a feather, patiently"},
        {"goal": "Dry a cup", "sol1": "leave it in the rain", "sol2": "use a towel"},
    ],
    "eprstmt.jsonl": [
        {"id": 0, "sentence": "很好", "label": "Positive"},
        {"id": 1, "sentence": "很差", "label": "Negative"},
    ],
    "xsum.jsonl": [
        {"document": "A cat sat on a mat.\nIt slept.", "summary": "The cat slept on the mat", "id": 7},
        {"document": "Rain fell.", "summary": "It rained", "id": 8},
    ],
    "c3.jsonl": [
        [
            ["男：你好。", "女：再见。"],
            [
                {"question": "谁先走?", "choice": ["女的", "男的"], "answer": "女的"},
                {"question": "几个人?", "choice": ["一个", "两个", "三个", "四个人"], "answer": "两个"},
            ],
            "1-1",
        ]
    ],
    "hellaswag.jsonl": [
        {
            "ind": 1, "activity_label": "Baking", "ctx_a": "A man bakes [header] bread.", "ctx_b": "he",
            "ctx": "unused", "label": 2,
            "endings": ["flies away.", "sings to the oven.", "waits.", "is a loaf of bread."],
        },
        {
            "ind": 2, "activity_label": "Rowing", "ctx_a": "A boat moves.", "ctx_b": "", "ctx": "unused",
            "label": 0,
            "endings": ["It is rowed.", "It is eaten by the crew.", "It is a car.", "It is a very long day."],
        },
    ],
    "arc_easy_dev.jsonl": [
        {
            "id": "Mercury_3",
            "question": {
                "stem": "What is cold?",
                "choices": [
                    {"text": "fire", "label": "1"}, {"text": "a hot stone", "label": "2"},
                    {"text": "a glacier", "label": "3"}, {"text": "tea", "label": "4"},
                ],
            },
            "answerKey": "3",
        },
    ],
    "arc_easy.jsonl": [
        {
            "id": "Mercury_1",
            "question": {
                "stem": "What is hot?",
                "choices": [
                    {"text": "a glacier", "label": "A"},
                    {"text": "fire", "label": "B"},
                    {"text": "a stone", "label": "C"},
                ],
            },
            "answerKey": "B",
        },
        {
            "id": "Mercury_2",
            "question": {
                "stem": "What is wet?",
                "choices": [
                    {"text": "sand", "label": "1"}, {"text": "paper", "label": "2"},
                    {"text": "water", "label": "3"}, {"text": "an old oak", "label": "4"},
                ],
            },
            "answerKey": "3",
        },
    ],
}  # fmt: skip


def write_items(folder: Path, changes: dict[str, list[Any]] | None = None) -> Path:
    """Write the folder, with some files changed, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in {**FILES, **(changes or {})}.items():
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "piqa-labels.lst").write_text("0\n1\n")
    return folder
