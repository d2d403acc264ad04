"""Answers match plain torch and lm-eval's own backend; training continues as if there were no requests."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import dynamic_module_utils

from data_scoring.corpus.corpus import Corpus
from data_scoring.tokenizer.tokenizer import open_tokenizer
from tests.trainer.two_ranks_evaluation import HARNESS_LENGTH, TRAINED, make_instances
from tests.trainer.two_ranks_layers import DEEP_LAYOUTS
from trainer.generate import Endings
from trainer.requests import Generation


@pytest.mark.parametrize("layout", DEEP_LAYOUTS)
def test_answers_are_those_of_plain_torch_on_every_layout(layout: str, found: list[dict[str, Any]]) -> None:
    plain = found[0]["evaluation"]["plain"]
    answers = [rank["evaluation"][layout] for rank in found]
    # One rank has them: of the last stage, the first.
    writer = 1 if layout in ("pipeline", "interleaved") else 0
    assert answers[1 - writer] is None
    for answer, expected in zip(answers[writer], plain, strict=True):
        if isinstance(expected, list):
            assert answer == expected
        else:
            assert answer.log_likelihood == pytest.approx(expected.log_likelihood, abs=2e-5)
            assert answer.is_greedy == expected.is_greedy
    assert [expected.is_greedy for expected in plain if not isinstance(expected, list)].count(True) == 1
    assert any(len(expected) > 1 for expected in plain if isinstance(expected, list))


def assert_same_training(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["losses"] == other["losses"]
    assert len(one["losses"]) == 5
    assert one["weights"].keys() == other["weights"].keys()
    for name, weight in one["weights"].items():
        assert np.array_equal(weight, other["weights"][name]), name


@pytest.mark.parametrize("layout", TRAINED)
def test_training_with_evaluation_in_between_is_training_without(layout: str, found: list[dict[str, Any]]) -> None:
    for rank in found:
        trained = rank["evaluation"][f"trained {layout}"]
        assert_same_training(trained["with"], trained["without"])
        assert list(trained["with"]["answers"]) == [f"answers/step-{step:08d}/some.parquet" for step in (2, 4)]
        assert trained["without"]["answers"] == {}


@pytest.mark.parametrize("layout", TRAINED)
def test_who_stops_training_in_an_evaluation_finds_it_done_when_training_goes_on(
    layout: str, found: list[dict[str, Any]]
) -> None:
    for rank in found:
        trained = rank["evaluation"][f"trained {layout}"]
        assert trained["stopped"]["checkpoints"] == ["step-00000002"]
        assert trained["stopped"]["answers"] == {}
        assert_same_training(trained["resumed"], trained["with"])
        answers, expected = (
            {file: given for file, (_, given) in trained[way]["answers"].items()} for way in ("resumed", "with")
        )
        assert answers == expected


@pytest.mark.parametrize("name", ["llama", "pangu"])
def test_responses_are_those_of_lm_evals_own_backend(
    name: str, found: list[dict[str, Any]], hugging_face: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(hugging_face / "modules"))
    harness = HFLM(
        str(hugging_face / name), device="cpu", dtype="float32", batch_size=3, max_length=HARNESS_LENGTH,
        trust_remote_code=True,
    )  # fmt: skip
    responses = found[0]["harness"][name]
    instances = make_instances()
    kinds = list(dict.fromkeys(instance.request_type for instance in instances))
    assert len(kinds) == 3
    for kind in kinds:
        chosen = [number for number, instance in enumerate(instances) if instance.request_type == kind]
        # lm-eval's backend stops at a context of nothing but spaces.
        chosen = [number for number in chosen if instances[number].args[0] != "  "]
        expected = getattr(harness, kind)([instances[number] for number in chosen])
        for number, theirs in zip(chosen, expected, strict=True):
            if kind == "loglikelihood":
                assert responses[number][0] == pytest.approx(theirs[0], abs=1e-4)
                assert responses[number][1] == theirs[1]
            elif kind == "loglikelihood_rolling":
                assert responses[number] == pytest.approx(theirs, abs=1e-3)
            else:
                assert responses[number] == theirs


def test_generation_ends_where_it_is_to(tiny_corpus: Corpus) -> None:
    tokenizer = open_tokenizer(tiny_corpus.tokenizer_path, None)
    [text] = tokenizer.encode_batch(["the model learns; what text says"])
    end, prompt = tokenizer.end_of_document, np.arange(5, dtype=np.int32)
    stopped = tokenizer.encode_batch(["the model learns;"])[0]
    requests = [
        Generation(prompt, 99),
        Generation(prompt, 3),
        Generation(prompt, 99, ("nowhere", "ns;")),
        # The last token that a model of 10 predicts is the eleventh.
        Generation(np.arange(8, dtype=np.int32), 99),
        Generation(prompt, 0),
    ]
    endings = Endings(requests, 10, tokenizer)
    longer = Endings(requests, 100, tokenizer)
    assert (endings.num_new_tokens, longer.num_new_tokens) == (6, 96)
    is_enough = [longer.take(torch.full((5,), token)) for token in [*text, end]]
    assert is_enough == [False] * len(text) + [len(text) <= 93]
    assert longer.tokens == [text, text[:3], stopped, text, []]
    for token in [*text, end]:
        endings.take(torch.full((5,), token))
    assert [len(tokens) for tokens in endings.tokens] == [6, 3, min(6, len(stopped)), 3, 0]
