"""The schemas of the evaluation data sets: rows, with their options, answers and texts.

A row has the fields of the hub's data set, which lm-eval's task definitions read; `convert` creates it from a record of
the data set's original release. Sources of the schemas: the releases named in docs/evaluation.md.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

Row = dict[str, Any]

LETTERS = "ABCDEFGHIJ"
# The order in which OpenCompass' configurations name them.
SENTIMENTS = ("Negative", "Positive")
ENTAILMENTS = ("entailment", "not_entailment")

# AGIEval's own wording (Zhong et al. 2023, arXiv 2304.06364; `convert_zero_shot` in its repository), which the hub's
# rows hold ready-made.
_AGIEVAL_ENGLISH = frozenset({
    "aqua-rat", "gaokao-english", "logiqa-en", "lsat-ar", "lsat-lr", "lsat-rc", "math", "sat-en",
    "sat-en-without-passage", "sat-math",
})  # fmt: skip
_AGIEVAL_GENERATED = frozenset({"math", "gaokao-mathcloze"})
# What stands between question and options there.
_AGIEVAL_OPTIONS = (" Answer Choices: ", " 选项：")

# WikiHow's headings, which lm-eval removes from HellaSwag's texts.
MARKUP = re.compile(r"\[.*?\]")


@dataclass(frozen=True)
class Schema:
    """How one data set's items are read; all functions except `split` and `convert` take a row."""

    convert: Callable[[Row], Row]  # record of the original file -> row; ValueError where it cannot be one
    question: Callable[[Row], str]  # question with its passage, without options
    options: Callable[[Row], list[Any] | None]  # texts to choose from; None where the answer is generated
    answer: Callable[[Row], Any]  # blank where there is none
    gold: Callable[[Row], list[int]]  # indices of the right options; ValueError where the answer is none of them
    subject: str | None = None  # field of the record that names the subject
    needed: tuple[str, ...] = ()  # fields of the row without which there is no question
    num_options: int | None = None  # how many every item has; None: as many as it has
    scored_options: int | None = None  # how many a scored item has; others are listed. None: any number
    split: Callable[[Any], list[Any]] = lambda record: [record]  # one line of the file -> records


def is_blank(value: Any) -> bool:
    """Return whether `value` holds nothing: null, NaN, empty, only white space."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or value in ([], {}) or (isinstance(value, str) and not value.strip())


def item_text(schema: Schema, row: Row) -> str:
    """Return an item's whole text: question with its passage, then the options or the answer, one per line."""
    options = schema.options(row)
    parts = [schema.question(row), *([schema.answer(row)] if options is None else options)]
    return "\n".join(str(part) for part in parts if not is_blank(part))


def defect(schema: Schema, row: Row) -> str | None:
    """Return why an item cannot be scored, or None. Raises ValueError if it is invalid."""
    missing = ["question"] if is_blank(schema.question(row)) else []
    missing += [name for name in schema.needed if is_blank(row[name])]
    answer, options = schema.answer(row), schema.options(row)
    if missing or is_blank(answer):
        return f"no {[*missing, 'answer'][0]}"
    if options is not None:
        return _option_defect(schema, row, options)
    if not isinstance(answer, str):
        raise ValueError(f"answer {answer!r:.40} is no text; repair the item")
    return None


def _option_defect(schema: Schema, row: Row, options: list[Any]) -> str | None:
    if len(options) < (schema.num_options or 2):
        return "options are missing"
    if schema.num_options is not None and len(options) > schema.num_options:
        raise ValueError(f"{len(options)} options, and {schema.num_options} are asked; repair the item")
    if schema.scored_options not in (None, len(options)):
        return f"{len(options)} options; the task scores items of {schema.scored_options}"
    for letter, option in zip(LETTERS, options, strict=False):
        if is_blank(option):
            return f"option {letter} is missing"
        if not isinstance(option, str):
            raise ValueError(f"option {letter} is {option!r:.40}, not a text; repair the item")
    wrong = [index for index in schema.gold(row) if not 0 <= index < len(options)]
    if wrong:
        raise ValueError(f"answer {schema.answer(row)!r} is none of the {len(options)} options; repair the answer")
    return None


def _position(answer: Any, options: list[Any]) -> int:
    if answer not in options:
        raise ValueError(f"answer {str(answer)[:60]!r} is none of the options {str(options)[:90]}; repair the answer")
    return options.index(answer)


def _field(record: Row, *names: str) -> Any:
    """Return the first existing field of `names`."""
    for name in names:
        if isinstance(record, dict) and name in record:
            return record[name]
    raise ValueError(f"no field {' or '.join(map(repr, names))}; write it, or leave the item out")


def _text(record: Row, *names: str) -> str:
    value = _field(record, *names)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"field {names[0]!r} is {value!r:.40}, not a text; repair the item")
    return value or ""


def _texts(record: Row, name: str) -> list[str | None]:
    """Return a field that is a list of texts, with None for blank ones; empty if the field is blank."""
    values = _field(record, name)
    if is_blank(values):
        return []
    if not isinstance(values, list):
        raise ValueError(f"field {name!r} is {values!r:.40}, not a list; repair the item")
    for value in values:
        if not is_blank(value) and not isinstance(value, str):
            raise ValueError(f"field {name!r} holds {value!r:.40}, not a text; repair the item")
    return [None if is_blank(value) else value for value in values]


def _choice(answer: Any, names: tuple[tuple[Any, ...], ...]) -> int | None:
    """Return the index of the option that `answer` stands for, in any of its spellings `names`; None where blank."""
    if is_blank(answer) or answer == -1:
        return None
    for spelling in names:
        for index, name in enumerate(spelling):
            if answer == name and isinstance(answer, bool) == isinstance(name, bool):
                return index
    raise ValueError(f"answer {answer!r:.60} is none of {', '.join(map(str, names[0]))}; repair the answer")


def _convert_lettered(question: str, answer: str) -> Callable[[Row], Row]:
    def convert(record: Row) -> Row:
        options = {letter: record.get(letter) for letter in "ABCD"}
        return {question: _text(record, question), **options, answer: record.get(answer)}

    return convert


def _convert_mmlu(record: Row) -> Row:
    choices = _texts(record, "choices") if "choices" in record else [record.get(letter) for letter in "ABCD"]
    spellings = ((*"ABCD",), (*"0123",), (0, 1, 2, 3))
    return {
        "question": _text(record, "question"),
        "choices": choices,
        "answer": _choice(record.get("answer"), spellings),
    }


def _convert_agieval(record: Row) -> Row:
    name = _text(record, "task")
    passage, question = _text({"passage": None, **record}, "passage"), _text(record, "question")
    is_english = name in _AGIEVAL_ENGLISH
    asked = passage + ("Q: " if is_english else "问题：") + question
    if name in _AGIEVAL_GENERATED:
        return {"query": asked + ("\nA: The answer is" if is_english else "\n答案："), "answer": record.get("answer")}
    # An item that lacks one is not asked.
    options = [option or "" for option in _texts(record, "options")]
    last = LETTERS[max(len(options) - 1, 0)]
    if is_english:
        query = f"{asked} Answer Choices: {' '.join(options)}\nA: Among A through {last}, the answer is"
    else:
        query = f"{asked} 选项：{' '.join(options)}\n答案：从A到{last}, 我们应选择"
    label = record.get("label")
    labels = [] if is_blank(label) else label if isinstance(label, list) else [label]
    # `defect` detects letters beyond the last option, since it knows whether options are missing.
    gold = [_choice(letter, ((*LETTERS,),)) for letter in labels]
    return {"query": query, "choices": options, "gold": [index for index in gold if index is not None]}


def _convert_boolq(record: Row) -> Row:
    label = _choice(record.get("label", record.get("answer")), ((False, True), ("false", "true"), (0, 1)))
    return {"question": _text(record, "question"), "passage": _text(record, "passage"), "label": label}


def _convert_axb(record: Row) -> Row:
    label = _choice(record.get("label"), (ENTAILMENTS, (0, 1)))
    return {"sentence1": _text(record, "sentence1"), "sentence2": _text(record, "sentence2"), "label": label}


def _convert_piqa(record: Row) -> Row:
    solutions = {name: record.get(name) for name in ("sol1", "sol2")}
    return {"goal": _text(record, "goal"), **solutions, "label": _choice(record.get("label"), (("0", "1"), (0, 1)))}


def _convert_eprstmt(record: Row) -> Row:
    return {"sentence": _text(record, "sentence"), "label": record.get("label")}


def _convert_xsum(record: Row) -> Row:
    # OpenCompass' own copy calls the document a dialogue.
    return {"document": _text(record, "document", "dialogue"), "summary": record.get("summary")}


def _split_c3(record: Any) -> list[Any]:
    if not isinstance(record, list) or len(record) < 2 or not all(isinstance(part, list) for part in record[:2]):
        raise ValueError("not a list of [lines of the passage, questions, id], as C3 has it; repair the item")
    if not all(isinstance(question, dict) for question in record[1]):
        raise ValueError("a question is no object of question, choice and answer, as C3 has it; repair the item")
    return [{**question, "context": record[0]} for question in record[1]]


def _convert_c3(record: Row) -> Row:
    return {
        "context": ["".join(line) for line in _field(record, "context")],
        "question": _text(record, "question"),
        "choice": _texts(record, "choice"),
        "answer": record.get("answer"),
    }


def _convert_hellaswag(record: Row) -> Row:
    label = record.get("label")
    return {
        "activity_label": _text(record, "activity_label"),
        "ctx_a": _text(record, "ctx_a"),
        "ctx_b": _text(record, "ctx_b"),
        "endings": _texts(record, "endings"),
        "label": "" if label is None else str(label),  # the hub has it as text, empty where there is none
    }


def _convert_arc(record: Row) -> Row:
    question = _field(record, "question")
    inner = question if isinstance(question, dict) else record
    choices = _field(inner, "choices")
    if isinstance(choices, list):
        choices = {name: [choice.get(name) for choice in choices] for name in ("text", "label")}
    labels, answer = [str(label) for label in choices["label"]], record.get("answerKey")
    return {
        "question": _text(inner, "stem", "question"),
        "choices": {"text": _texts(choices, "text"), "label": labels},
        "answerKey": None if is_blank(answer) else str(answer),
    }


def _agieval_question(row: Row) -> str:
    """Return the question without its options and without the last line, which asks for the answer."""
    asked: str = row["query"].rpartition("\n")[0]
    for mark in _AGIEVAL_OPTIONS if "choices" in row else ():
        before, found, _ = asked.rpartition(mark)
        if found:
            return before
    return asked


CEVAL = Schema(
    _convert_lettered("question", "answer"),
    question=lambda row: row["question"],
    options=lambda row: [row[letter] for letter in "ABCD"],
    answer=lambda row: row["answer"],
    gold=lambda row: [_position(row["answer"], [*"ABCD"])],
    subject="subject",
)

CMMLU = Schema(
    _convert_lettered("Question", "Answer"),
    question=lambda row: row["Question"],
    options=lambda row: [row[letter] for letter in "ABCD"],
    answer=lambda row: row["Answer"],
    gold=lambda row: [_position(row["Answer"], [*"ABCD"])],
    subject="subject",
)

MMLU = Schema(
    _convert_mmlu,
    question=lambda row: row["question"],
    options=lambda row: row["choices"],
    answer=lambda row: row["answer"],
    gold=lambda row: [row["answer"]],
    subject="subject",
    num_options=4,
)

AGIEVAL = Schema(
    _convert_agieval,
    question=_agieval_question,
    options=lambda row: row.get("choices"),
    answer=lambda row: row.get("gold", row.get("answer")),
    gold=lambda row: row.get("gold", []),
    subject="task",
)

BOOLQ = Schema(
    _convert_boolq,
    question=lambda row: f"{row['passage']}\n{row['question']}",
    options=lambda row: ["no", "yes"],
    answer=lambda row: None if row["label"] == -1 else row["label"],
    gold=lambda row: [int(row["label"])],
    needed=("question", "passage"),
)

AXB = Schema(
    _convert_axb,
    question=lambda row: f"{row['sentence1']}\n{row['sentence2']}",
    options=lambda row: ["Yes", "No"],
    answer=lambda row: None if row["label"] == -1 else row["label"],
    gold=lambda row: [row["label"]],
    needed=("sentence1", "sentence2"),
)

PIQA = Schema(
    _convert_piqa,
    question=lambda row: row["goal"],
    options=lambda row: [row["sol1"], row["sol2"]],
    answer=lambda row: None if row["label"] == -1 else row["label"],
    gold=lambda row: [row["label"]],
)

EPRSTMT = Schema(
    _convert_eprstmt,
    question=lambda row: row["sentence"],
    options=lambda row: ["消极。", "积极。"],
    answer=lambda row: row["label"],
    gold=lambda row: [_position(row["label"], [*SENTIMENTS])],
)

XSUM = Schema(
    _convert_xsum,
    question=lambda row: row["document"],
    options=lambda row: None,
    answer=lambda row: row["summary"],
    gold=lambda row: [],
)

C3 = Schema(
    _convert_c3,
    question=lambda row: "\n".join([*row["context"], row["question"]]),
    options=lambda row: row["choice"],
    answer=lambda row: row["answer"],
    gold=lambda row: [_position(row["answer"], row["choice"])],
    needed=("question",),
    split=_split_c3,
)

HELLASWAG = Schema(
    _convert_hellaswag,
    question=lambda row: f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b']}",
    # lm-eval removes headings, so an ending that is only a heading counts as missing.
    options=lambda row: [ending and MARKUP.sub("", ending) for ending in row["endings"]],
    answer=lambda row: row["label"],
    gold=lambda row: [_position(str(row["label"]), [str(index) for index in range(len(row["endings"]))])],
)

ARC_EASY = Schema(
    _convert_arc,
    question=lambda row: row["question"],
    options=lambda row: row["choices"]["text"],
    answer=lambda row: row["answerKey"],
    gold=lambda row: [_position(row["answerKey"], row["choices"]["label"])],
)

ARC_EASY_OF_FOUR = replace(ARC_EASY, scored_options=4)
