"""lm-eval's requests in token ids, what fits into a model, and lm-eval's results from answers."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from data_scoring.base.progress import silent
from data_scoring.corpus.corpus import Corpus
from data_scoring.tokenizer.tokenizer import open_tokenizer
from flows.evaluation.harness_model import open_model, score_answers
from flows.evaluation.harness_requests import Reader, ask
from flows.models.hugging_face_models import export_model
from flows.run.config import parse_config
from flows.run.folder import open_run
from flows.stages.stage_order import complete
from tests.conftest import make_documents
from trainer.requests import Generation, Likelihood, LogLikelihood, read_requests, requests_path, write_requests


@pytest.fixture
def reader(tiny_corpus: Corpus) -> Reader:
    return Reader(open_tokenizer(tiny_corpus.tokenizer_path, None), 32)


def instance(kind: Any, *arguments: Any) -> Instance:
    return Instance(kind, {}, arguments, 0, metadata=("some", 0, 1))


def test_a_continuation_is_what_comes_after_the_contexts_tokens(reader: Reader) -> None:
    cases = [("the model", " learns"), ("the model ", "learns"), ("", "learns"), ("  ", "text"), ("the mod", "el")]
    asked = reader.read([instance("loglikelihood", *case) for case in cases])
    decode = reader.tokenizer.decode
    parts = [
        (decode(request.context.tolist()), decode(request.continuation.tolist()))
        for request in asked.requests
        if isinstance(request, Likelihood)
    ]
    # Spaces between go with the continuation; without a context, the end of a document is there; where the
    # tokenizer joins the two, what it joins is asked.
    assert parts[:3] == [("the model", " learns"), ("the model", " learns"), ("<|endoftext|>", "learns")]
    assert parts[3] == ("<|endoftext|>", "  text")
    assert parts[4] == ("the", " model")


def test_long_texts_are_asked_in_windows_that_predict_each_token_once(reader: Reader) -> None:
    text = "where the loss falls and it goes on, " * 9
    [tokens] = reader.tokenizer.encode_batch([text])
    asked = reader.read([instance("loglikelihood_rolling", text)])
    assert len(asked.requests) == -(-len(tokens) // 32)
    predicted = [token for request in asked.requests for token in request.continuation.tolist()]  # type: ignore[union-attr]
    assert predicted == tokens
    assert {len(request.path) for request in asked.requests} == {32}  # type: ignore[union-attr]
    answers = [LogLikelihood(-float(number + 1), False) for number in range(len(asked.requests))]
    assert asked.respond([instance("loglikelihood_rolling", text)], answers) == [
        -sum(range(1, len(asked.requests) + 1))
    ]


def test_what_fits_is_what_a_model_can_be_asked(reader: Reader) -> None:
    [tokens] = reader.tokenizer.encode_batch(["the model learns " * 40])
    for count in (31, 32, 33, 34, 60):
        text = reader.tokenizer.decode(tokens[:count])
        [again] = reader.tokenizer.encode_batch([text])
        assert reader.fits(text[:5], ["x", text[5:]]) == (len(again) <= 33)
        # The end of a document is read before.
        assert reader.fits("", [text]) == (len(again) <= 32)


def test_generated_text_ends_before_its_stop_string_and_sampling_is_refused(reader: Reader) -> None:
    arguments = {"until": ["\n", "falls"], "max_gen_toks": 7, "do_sample": False}
    one = instance("generate_until", "the loss", arguments)
    asked = reader.read([one])
    [request] = asked.requests
    assert isinstance(request, Generation)
    assert (request.max_new_tokens, request.stop) == (7, ("\n", "falls"))
    [tokens] = reader.tokenizer.encode_batch([" goes on until it falls"])
    assert asked.respond([one], [tokens]) == [" goes on until it "]
    with pytest.raises(ValueError, match="some: requests sampling"):
        reader.read([instance("generate_until", "the loss", {"do_sample": True, "temperature": 1.0})])


@dataclass(frozen=True)
class Tasks:
    """What `EvaluationTask` has of this."""

    subtasks: dict[str, ConfigurableTask]
    samples: dict[str, list[int]]
    groups: dict[str, Any] = field(default_factory=dict)


def make_task(name: str, correct: list[int]) -> ConfigurableTask:
    rows = [{"question": f"{name} {number}", "gold": gold} for number, gold in enumerate(correct)]
    config = {
        "task": name,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "gold",
        "doc_to_choice": ["text", "loss", "model"],
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    return ConfigurableTask(config=config)


def test_scores_are_those_of_the_answers(reader: Reader, tmp_path: Path) -> None:
    # Of the first subject the second item is left out.
    subtasks = {"one": make_task("one", [0, 1, 2, 2]), "two": make_task("two", [1, 1])}
    task = Tasks(subtasks, {"one": [0, 2, 3], "two": [0, 1]})
    asked = ask(task, reader)
    assert len(asked.requests) == 3 * 5
    # By way of a file, as ranks get them.
    write_requests(requests_path(tmp_path, "some"), asked.requests)
    texts = [
        reader.tokenizer.decode(request.path.tolist() + request.continuation[-1:].tolist())  # type: ignore[union-attr]
        for request in read_requests(requests_path(tmp_path, "some"))
    ]
    # A model that is for the last option always.
    answers = [LogLikelihood(-1.0 if text.endswith("model") else -2.0, False) for text in texts]
    found = score_answers(task, asked, answers)
    assert found["results"]["one"]["acc,none"] == pytest.approx(2 / 3)
    assert found["results"]["two"]["acc,none"] == 0
    # The standard error of a mean: s / sqrt(n), with n - 1 in s.
    assert found["results"]["one"]["acc_stderr,none"] == pytest.approx((2 / 9 * 3 / 2 / 3) ** 0.5)
    assert [(sample["doc_id"], sample["acc"]) for sample in found["samples"]["one"]] == [(0, 0), (2, 1), (3, 1)]


@pytest.mark.slow
def test_lm_eval_may_drive_the_model_of_a_round_on_any_layout(tmp_path: Path) -> None:
    """Training and two launches of ranks: half a minute."""
    from lm_eval.models.huggingface import HFLM

    run = open_run(
        parse_config(
            {
                "name": "asked",
                "output": str(tmp_path),
                "corpus": {
                    "sources": [{"name": "words", "path": str(write_documents(tmp_path / "words"))}],
                    "seq_length": 32,
                    "num_shards": 2,
                },
                "tokenizer": {"vocab_size": 300},
                "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 64},
                "train": {"global_batch_size": 8, "micro_batch_size": 2},
                "parallel": {"tensor": 2, "sequence": True},
            },
            "here",
        )
    )
    for stage, number in (("prepare", 0), ("mix", 1), ("train", 1)):
        complete(run, stage, number, silent)
    export_model(run.folder, None, tmp_path / "exported")
    theirs = HFLM(str(tmp_path / "exported"), device="cpu", dtype="float32", batch_size=2)
    texts = [("the model", " learns"), ("the model", " text"), ("", "where it goes")]
    instances = [instance("loglikelihood", *each) for each in texts]
    ours = open_model(run.folder, 1, silent)
    for (found, is_greedy), (expected, would_be) in zip(
        ours.loglikelihood(instances), theirs.loglikelihood(instances), strict=True
    ):
        assert found == pytest.approx(expected, abs=1e-4)
        assert is_greedy == would_be
    generated = [instance("generate_until", "the", {"until": ["\n"], "max_gen_toks": 8})]
    assert ours.generate_until(generated) == theirs.generate_until(generated)
    # Nothing is left of it but what ranks said.
    assert not list(run.folder.glob(".evaluation-*"))


def write_documents(folder: Path) -> Path:
    folder.mkdir()
    for number, document in enumerate(make_documents(80)):
        (folder / f"{number:03d}.txt").write_text(document)
    return folder
