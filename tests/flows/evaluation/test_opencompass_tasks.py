"""OpenCompass' tasks against its procedure, written down a second time: plain torch on the files' own records."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.tasks.hellaswag import utils as hellaswag_utils
from tokenizers import Tokenizer as RawTokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from data_scoring.corpus.corpus import Corpus
from data_scoring.evaluation.opencompass import hellaswag_text
from data_scoring.evaluation.tasks import TASKS
from data_scoring.tokenizer.tokenizer import open_tokenizer
from flows.evaluation.harness_requests import Reader, ask
from flows.evaluation.questions import Question
from flows.evaluation.scores import score_question
from flows.evaluation.task_loading import load_tasks
from tests.conftest import make_documents
from trainer.requests import Likelihood, LogLikelihood

_NUM_ITEMS = 25
_LENGTH = 256


def _sentence(draw: random.Random, words: list[str], least: int, most: int) -> str:
    return " ".join(draw.choices(words, k=draw.randint(least, most)))


@pytest.fixture(scope="module")
def records() -> dict[str, list[Any]]:
    """Records of the three files; options differ in length, contexts have headings and colons."""
    draw, words = random.Random(6), sorted({word for text in make_documents(20) for word in text.split()})
    arc, hellaswag, c3 = [], [], []
    for number in range(_NUM_ITEMS):
        count = (4, 4, 4, 3, 5)[number % 5]
        labels = ("ABCDE", "12345")[number % 2]
        choices = [{"text": _sentence(draw, words, 1, 9), "label": labels[place]} for place in range(count)]
        question = {"stem": _sentence(draw, words, 2, 12) + "?", "choices": choices}
        arc.append({"id": f"{number}", "question": question, "answerKey": labels[draw.randrange(count)]})
        middle = (" ", " [step] ", ": ", " [title] ")[number % 4]
        hellaswag.append(
            {
                "activity_label": _sentence(draw, words, 1, 3), "ctx_b": _sentence(draw, words, 1, 4),
                "ctx_a": _sentence(draw, words, 2, 9) + middle + _sentence(draw, words, 1, 3) + ".",
                "endings": [_sentence(draw, words, 1, 15) for _ in range(4)], "label": draw.randrange(4),
            }
        )  # fmt: skip
        options = [_sentence(draw, words, 1, 9) for _ in range(2 + number % 3)]
        asked = {"question": _sentence(draw, words, 2, 6), "choice": options, "answer": draw.choice(options)}
        c3.append([[_sentence(draw, words, 3, 9), _sentence(draw, words, 3, 9)], [asked], f"{number}"])
    return {"arc_easy_dev.jsonl": arc, "hellaswag.jsonl": hellaswag, "c3.jsonl": c3}


def arc_prompts(record: Any) -> tuple[list[str], int] | None:
    """Return the four prompts and the right one, as OpenCompass' ARC_e_ppl_a450bd makes them; None if it skips it."""
    stem, choices = record["question"]["stem"], record["question"]["choices"]
    if len(choices) != 4:
        return None
    labels = [choice["label"] for choice in choices]
    return [f"Question: {stem}\nAnswer: \n{choice['text']}" for choice in choices], labels.index(record["answerKey"])


def hellaswag_prompts(record: Any) -> tuple[list[str], int]:
    """Return the prompts of hellaswag_ppl_47bff9, from the query and choices that lm-eval's process_docs makes."""
    query = hellaswag_utils.preprocess(
        record["activity_label"] + ": " + record["ctx_a"] + " " + record["ctx_b"].capitalize()
    )
    parts = query.split(": ", 2)
    choices = [hellaswag_utils.preprocess(ending) for ending in record["endings"]]
    return [parts[-1] + "\n" + choice for choice in choices], record["label"]


def c3_prompts(record: Any) -> tuple[list[str], int]:
    """Return the prompts of CLUE_C3_ppl_e24a31, its options filled up to four with copies of the first."""
    passage, [asked], _ = record
    options = asked["choice"] + [asked["choice"][0]] * (4 - len(asked["choice"]))
    prompts = [f"文章：{' '.join(passage)}\n问题：{asked['question']}\n答案：{option}" for option in options]
    return prompts, options.index(asked["answer"])


def total_loss(model: Any, ids: list[int]) -> float:
    """Return the sum of the losses of all tokens that the model predicts, nats."""
    tokens = torch.tensor([ids])
    return float(torch.nn.functional.cross_entropy(model(tokens).logits[0, :-1], tokens[0, 1:], reduction="sum"))


@pytest.mark.parametrize(
    ("name", "prompts_of"),
    [
        ("arc_easy_opencompass", arc_prompts),
        ("hellaswag_opencompass", hellaswag_prompts),
        ("c3", c3_prompts),
    ],
)
def test_the_ablations_are_scored_as_opencompass_does(
    name: str, prompts_of: Any, records: dict[str, list[Any]], tiny_corpus: Corpus, tmp_path: Path
) -> None:
    [file] = TASKS[name].files.names
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records[file]]
    (tmp_path / file).write_text("".join(lines), encoding="utf-8")
    tokenizer = open_tokenizer(tiny_corpus.tokenizer_path, None)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=_LENGTH, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    raw = RawTokenizer.from_file(str(tiny_corpus.tokenizer_path))
    expected, by_sum = [], []
    with torch.no_grad():
        for record in records[file]:
            made = prompts_of(record)
            if made is not None:
                prompts, gold = made
                ids = [[tokenizer.end_of_document, *raw.encode(text, add_special_tokens=False).ids] for text in prompts]
                sums = [total_loss(model, each) for each in ids]
                # `get_ppl` divides by the number of input tokens, of which the first has no loss.
                means = [total / len(each) for total, each in zip(sums, ids, strict=True)]
                expected.append(float(means.index(min(means)) == gold))
                by_sum.append(float(sums.index(min(sums)) == gold))
        reader = Reader(tokenizer, _LENGTH)

        def count_tokens(texts: Any) -> list[int]:
            return [len(ids) for ids in tokenizer.encode_batch(list(texts))]

        [task] = load_tasks([name], tmp_path, None, reader.fits, count_tokens)
        question = Question(task, ask(task, reader))
        answers = [answer(model, request) for request in question.asked.requests if isinstance(request, Likelihood)]
        rows, items = score_question(question, answers)
    assert [item["score"] for item in items] == expected
    assert rows[0]["score"] == pytest.approx(sum(expected) / len(expected))
    # Right and wrong answers occur, and the sum of the losses would decide otherwise.
    assert 0 < sum(expected) < len(expected)
    assert by_sum != expected
    skipped = [record for record in records[file] if prompts_of(record) is None]
    assert len(task.unscorable) == len(skipped)
    assert len(items) + len(skipped) == _NUM_ITEMS


def answer(model: Any, request: Likelihood) -> LogLikelihood:
    """Return the log-likelihood of a request's continuation, nats, by the whole text's logits."""
    ids = [*request.context.tolist(), *request.continuation.tolist()]
    log_probabilities = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    start = len(request.context)
    chosen = [float(log_probabilities[place - 1, ids[place]]) for place in range(start, len(ids))]
    return LogLikelihood(sum(chosen), False)


def test_items_without_four_options_are_listed(records: dict[str, list[Any]], tmp_path: Path) -> None:
    lines = [json.dumps(record) + "\n" for record in records["arc_easy_dev.jsonl"]]
    (tmp_path / "arc_easy_dev.jsonl").write_text("".join(lines))
    [task] = load_tasks(["arc_easy_opencompass"], tmp_path, 5, lambda *_: True, lambda texts: [1] * len(texts))
    assert [(each.item, each.reason) for each in task.unscorable] == [
        ("arc_easy_dev.jsonl:4", "3 options; the task scores items of 4"),
        ("arc_easy_dev.jsonl:5", "5 options; the task scores items of 4"),
    ]
    assert task.chance == 0.25


@pytest.mark.parametrize(
    "text", ["a  b", " [title] a [step] b", "x [title] How to [substeps] y. ", "[header] only", "plain", "a : b: c"]
)
def test_texts_of_hellaswag_are_cleaned_as_lm_eval_does(text: str) -> None:
    assert hellaswag_text(text) == hellaswag_utils.preprocess(text)
    assert re.search(r"\[|\]", hellaswag_text(text)) is None
