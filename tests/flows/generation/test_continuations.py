"""Continuations are those of transformers with the exported model, on one rank and on two, and arrive as they come."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from flows.cli.main import main
from flows.generation.continuations import Continuation, Continuer
from flows.models.hugging_face_models import export_model
from flows.run.config import parse_config
from flows.run.folder import Run
from tests.conftest import Ranks
from tests.flows.trained_run import make_run
from tests.forked_ranks import forking
from trainer.sampling import Sampling

PROMPTS = ["the model learns", "", "where it goes on until the loss", "床前明月", "12: a text"]
LENGTH = 32


@pytest.fixture(scope="module")
def run(ranks: Ranks, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with the trained tiny model as its first round."""
    return make_run(tmp_path_factory.mktemp("runs"), ranks.corpus, trained)


@pytest.fixture(autouse=True)
def forked() -> Iterator[None]:
    """Ranks that start at once."""
    with forking():
        yield


def ignore(*_: object) -> None:
    """A progress callback, or one for text."""


def continue_prompts(
    run: Run, prompts: list[str], count: int = 1, most: int = 40, **sampling: float
) -> list[Continuation]:
    with Continuer(run, 1, ignore) as continuer:
        return continuer.continue_prompts(prompts, count, most, Sampling(**sampling), ignore)


@pytest.fixture(scope="module")
def greedy(run: Run) -> list[Continuation]:
    with forking():
        return continue_prompts(run, PROMPTS)


@pytest.fixture(scope="module")
def exported(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[object, object]]:
    """The model and the tokenizer, as transformers opens them."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("exported") / "model"
    export_model(run.folder, 1, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(folder.parent / "modules"))
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        yield model, AutoTokenizer.from_pretrained(folder)


def test_greedy_continuations_are_those_of_transformers(
    greedy: list[Continuation], exported: tuple[object, object]
) -> None:
    model, tokenizer = exported
    for prompt, found in zip(PROMPTS, greedy, strict=True):
        ids = tokenizer(prompt)["input_ids"] or [tokenizer.eos_token_id]
        # The last token that the model predicts is not read.
        most = min(40, LENGTH + 1 - len(ids))
        whole = model.generate(torch.tensor([ids]), max_new_tokens=most, do_sample=False)[0].tolist()
        new = [token for token in whole[len(ids) :] if token != tokenizer.eos_token_id]
        assert (found.prompt, found.num_tokens) == (prompt, len(new))
        assert found.text.rstrip("\ufffd") == tokenizer.decode(whole)[len(tokenizer.decode(ids)) :].removesuffix(
            "<|endoftext|>"
        ).rstrip("\ufffd")
        assert found.ended_by == ("model length" if len(ids) + len(new) == LENGTH + 1 else "end of text")
    assert len({found.text for found in greedy}) > 2


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"pipeline": 2}, {"data": 2}])
def test_every_layout_continues_as_one_rank(run: Run, greedy: list[Continuation], parallel: dict[str, int]) -> None:
    values = run.config.model_dump() | {"parallel": parallel}
    other = Run(parse_config(values, "test"), run.folder)
    drawn = {"temperature": 0.8, "top_p": 0.9, "seed": 5}
    assert continue_prompts(other, PROMPTS) == greedy
    assert continue_prompts(other, PROMPTS[:2], 3, **drawn) == continue_prompts(run, PROMPTS[:2], 3, **drawn)


def test_first_tokens_follow_the_models_distribution(run: Run, exported: tuple[object, object]) -> None:
    model, tokenizer = exported
    found = continue_prompts(run, ["the model learns"], 1500, 1, temperature=1.0, seed=3)
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer("the model learns")["input_ids"]])).logits[0, -1].double()
    expected = logits.softmax(dim=-1).numpy() * 1500
    # Tokens by their text: an empty one is the end of a document, or part of a character.
    texts = np.array([tokenizer.decode([token]) for token in range(len(expected))])
    texts[[("\ufffd" in text) or text == "<|endoftext|>" for text in texts]] = ""
    drawn = np.array([each.text for each in found])
    often = [text for text in np.unique(texts) if expected[texts == text].sum() >= 8]
    counts = [(drawn == text).sum() for text in often]
    wanted = [expected[texts == text].sum() for text in often]
    assert len(often) > 5
    counts, wanted = [*counts, 1500 - sum(counts)], [*wanted, 1500 - sum(wanted)]
    assert chisquare(counts, wanted).pvalue > 0.001


def test_seeds_decide_and_other_prompts_do_not(run: Run) -> None:
    def draw(prompts: list[str], seed: int) -> list[str]:
        return [each.text for each in continue_prompts(run, prompts, 2, temperature=1.5, seed=seed)]

    assert draw(["the model"], 1) == draw(["the model", "a longer text than that"], 1)[:2]
    assert len({*draw(["the model"], 1), *draw(["the model"], 2)}) == 4


def test_text_is_passed_on_as_it_comes(run: Run, greedy: list[Continuation]) -> None:
    shown: dict[int, list[str]] = {}
    ended = []

    def show(number: int, text: str, is_over: bool) -> None:
        assert number not in ended
        shown.setdefault(number, []).append(text)
        if is_over:
            ended.append(number)

    with Continuer(run, 1, ignore) as continuer:
        continuer.continue_prompts(PROMPTS, 1, 40, Sampling(), show)
    assert ["".join(shown[number]) for number in range(len(PROMPTS))] == [each.text for each in greedy]
    assert sorted(ended) == [0, 1, 2, 3, 4]


def test_a_continuer_leaves_nothing_behind(run: Run) -> None:
    continue_prompts(run, ["the"], most=2)
    assert [*(run.folder / "logs").iterdir()] == []


class TestCommand:
    @pytest.fixture(autouse=True)
    def complete(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The run's folder has the model, but no records of stages."""
        monkeypatch.setattr("flows.cli.round_option.is_complete", lambda _, stage, number: number == 1)
        monkeypatch.setattr("flows.stages.stage.Stages.verify", lambda *_: None)

    def test_prompts_are_printed_with_their_continuations(
        self, run: Run, greedy: list[Continuation], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["generate", str(run.folder), *(f"--prompt={prompt}" for prompt in PROMPTS)]) == 0
        printed = capsys.readouterr()
        assert printed.out == "\n".join(f"{each.prompt}{each.text}\n" for each in greedy)
        num_cut = sum(each.ended_by == "model length" for each in greedy)
        assert f"note: {num_cut} of 5 continuations ended at the model's length" in printed.err

    def test_prompts_of_a_file_and_json(
        self, run: Run, greedy: list[Continuation], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "prompts").write_bytes("\ufeffthe model learns\r\n\n12: a text".encode())
        assert main(["generate", str(run.folder), "--prompts", str(tmp_path / "prompts"), "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert [row["text"] for row in rows] == [greedy[0].text, greedy[4].text]
        assert rows[0].keys() == {"prompt", "sample", "text", "num_tokens", "ended_by"}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--samples", "2"], "--samples: has no effect with temperature 0"),
            (["--top-k", "2"], "--top-k: has no effect with temperature 0"),
            (["--top-p", "0.5"], "--top-p: has no effect with temperature 0"),
            (["--temperature", "-1"], "--temperature: -1.0 is not 0 or more"),
            (["--temperature", "nan"], "--temperature: nan is not 0 or more"),
            (["--temperature", "1", "--top-p", "1.5"], "--top-p: 1.5 is not above 0 and at most 1"),
            (["--temperature", "1", "--top-k", "0"], "--top-k: 0 is not 1 or more"),
            (["--seed", "-1"], "--seed: -1 is not 0 or more"),
            (["--max-tokens", "0"], "--max-tokens: 0 is less than 1"),
            (["--round", "7"], "'7' is not a trained round"),
            (["--prompt", "the model " * 40], "prompt 2: has "),
            (["--prompt", "a\udcff"], "prompt 2: not UTF-8"),
            (["--prompts", "absent"], "--prompts absent: cannot be read (No such file or directory); correct"),
            (["--prompts", "/"], "--prompts /: cannot be read (Is a directory); correct"),
        ],
    )
    def test_what_cannot_be_done_is_one_line(
        self, run: Run, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["generate", str(run.folder), "--prompt", "the", *options]) == 1
        printed = capsys.readouterr()
        assert (printed.out, printed.err.count("\n")) == ("", 1)
        assert message in printed.err
