"""The tasks: prompts and scores worked out by hand, lm-eval's own evaluator computing the metrics."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import jinja2
import lm_eval
import pytest
import yaml
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate

from data_scoring.evaluation.tasks import ABLATION, PAPER, TASKS, columns, resolve_names
from flows.evaluation.opencompass_scoring import score_summary, score_whole_text
from flows.evaluation.task_loading import EvaluationTask, load_tasks, task_texts
from tests.evaluation_data import FILES, write_items

SHARED = Path("../shared/evaldata")
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="needs the samples of public evaluation sets")


def _all_fit(context: str, continuations: Sequence[str]) -> bool:
    return True


def _characters(texts: Sequence[str]) -> list[int]:
    return [len(text) for text in texts]


class ShortestAnswer(LM):
    """A model to which an option is the likelier the fewer characters it has, and which repeats itself."""

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        return [(-float(len(request.args[1])), False) for request in requests]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise NotImplementedError

    def generate_until(self, requests: list[Any]) -> list[str]:
        return [" the cat ran\nthe mat the mat" for _ in requests]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, EvaluationTask]:
    """Return all tasks over the tiny folder, loaded while nothing can be fetched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("socket.socket.connect", _refuse)
        patch.setattr(datasets, "load_dataset", _refuse)
        loaded = load_tasks([*TASKS], write_items(tmp_path_factory.mktemp("items")), None, _all_fit, _characters)
    return {task.name: task for task in loaded}


def _refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("nothing may be fetched where local files are given")


def _requests(task: EvaluationTask, subtask: str | None = None) -> list[tuple[Any, ...]]:
    harness_task = task.subtasks[subtask or next(iter(task.subtasks))]
    harness_task.build_all_requests()
    return [instance.args for instance in harness_task.instances]


def test_titles_groups_and_metrics_of_the_table(tasks: dict[str, EvaluationTask]) -> None:
    by_name = {column.name: column for column in columns()}
    assert [
        (by_name[task.name].title, by_name[task.name].group, task.metric, task.num_fewshot) for task in tasks.values()
    ] == [
        ("C-Eval", "Examination", "acc", 5),
        ("CMMLU", "Examination", "acc", 5),
        ("MMLU", "Examination", "acc", 5),
        ("AGI-Eval", "Examination", "acc", 0),
        ("BoolQ", "Knowledge", "acc", 0),
        ("AX-b", "Reasoning", "acc_text", 0),
        ("PIQA", "Reasoning", "acc", 0),
        ("EPRSTMT", "Understanding", "acc_text", 0),
        ("XSum", "Understanding", "rouge1", 0),
        ("C3", "Understanding", "acc_text", 0),
        ("ARC-Easy (OpenCompass)", "Ablation", "acc_text", 0),
        ("HellaSwag (OpenCompass)", "Ablation", "acc_text", 0),
        ("HellaSwag", "lm-eval", "acc_norm", 0),
        ("ARC-Easy", "lm-eval", "acc", 0),
    ]
    assert all(not task.unscorable and not task.num_shortened for task in tasks.values())


def test_chance_by_hand(tasks: dict[str, EvaluationTask]) -> None:
    chances = {name: task.chance for name, task in tasks.items()}
    of_four = ("ceval", "cmmlu", "mmlu", "hellaswag", "hellaswag_opencompass", "arc_easy_opencompass")
    quarter = dict.fromkeys(of_four, 0.25)
    half = dict.fromkeys(("boolq", "axb", "piqa", "eprstmt"), 0.5)
    # AGIEval's subjects: one of five, two right ones of four, one of two, and two that are generated.
    agieval = (1 / 5 + 2 / 4 + 1 / 2 + 0 + 0) / 5
    others = {"agieval": agieval, "xsum": 0, "c3": (1 / 2 + 1 / 4) / 2, "arc_easy": (1 / 3 + 1 / 4) / 2}
    assert chances == pytest.approx({**quarter, **half, **others})


def test_prompts_of_zero_shots_by_hand(tasks: dict[str, EvaluationTask]) -> None:
    boolq = "Snow -- Snow is white.\nQuestion: is snow white?\nAnswer:"
    assert _requests(tasks["boolq"])[:2] == [(boolq, " no"), (boolq, " yes")]
    axb = "It rains.\nIt snows.\nIs the sentence below entailed by the sentence above?"
    assert _requests(tasks["axb"])[:2] == [("", f"{axb}\nYes"), ("", f"{axb}\nNo")]
    piqa = "Question: Open a tin\nAnswer:"
    assert _requests(tasks["piqa"])[:2] == [(piqa, " use an opener"), (piqa, " use a feather, patiently")]
    eprstmt = '内容： "很好"。情绪分类：'
    assert _requests(tasks["eprstmt"])[:2] == [("", f"{eprstmt}\n消极。"), ("", f"{eprstmt}\n积极。")]
    c3 = "文章：男：你好。 女：再见。\n问题：谁先走?"
    assert _requests(tasks["c3"])[:2] == [("", f"{c3}\n答案：女的"), ("", f"{c3}\n答案：男的")]
    hellaswag = "Baking: A man bakes bread. He"
    assert _requests(tasks["hellaswag"])[0] == (hellaswag, " flies away.")
    # OpenCompass has no activity, and a line feed between prompt and option.
    context = "A man bakes bread. He"
    assert _requests(tasks["hellaswag_opencompass"])[0] == ("", f"{context}\nflies away.")
    arc = "Question: What is cold?\nAnswer: "
    assert _requests(tasks["arc_easy_opencompass"])[1:3] == [("", f"{arc}\na hot stone"), ("", f"{arc}\na glacier")]
    arc = "Question: What is hot?\nAnswer:"
    assert _requests(tasks["arc_easy"])[:3] == [(arc, " a glacier"), (arc, " fire"), (arc, " a stone")]
    xsum, options = _requests(tasks["xsum"])[0]
    assert xsum == (
        "Document：A cat sat on a mat.\nIt slept.\nBased on the previous text, provide a brief single summary:"
    )
    assert (options["max_gen_toks"], options["until"]) == (100, [])
    assert list(tasks["agieval"].subtasks) == [
        "agieval_aqua_rat", "agieval_jec_qa_ca", "agieval_lsat_rc", "agieval_gaokao_mathcloze", "agieval_math",
    ]  # fmt: skip
    query = "Q: Which? Answer Choices: (A)1 (B)2 (C)3 (D)4 (E)5\nA: Among A through E, the answer is"
    assert _requests(tasks["agieval"])[4] == (query, " (E)5")
    assert _requests(tasks["agieval"], "agieval_math")[0][0] == "Q: 3+4?\nA: The answer is"


@pytest.mark.parametrize(
    ("task", "file", "template", "first", "answers"),
    [
        ("ceval", "ceval/ceval-valid_accountant.yaml", "ceval/_default_ceval_yaml", 10, "CDABC"),
        ("mmlu", "mmlu/default/mmlu_anatomy.yaml", "mmlu/default/_default_template_yaml", 0, "ABCDA"),
        ("cmmlu", "cmmlu/cmmlu_agronomy.yaml", "cmmlu/_default_template_yaml", 0, "BBBBB"),
    ],
)
def test_five_shots_are_what_lm_evals_own_file_says(
    tasks: dict[str, EvaluationTask], task: str, file: str, template: str, first: int, answers: str
) -> None:
    """The prompt put together by hand from the YAML's description and template; examples `first` to `first` + 4."""
    folder = Path(lm_eval.__file__).parent / "tasks"
    subtask, name = Path(file).stem, Path(file).stem.rpartition("_")[2]
    ask = jinja2.Template(yaml.safe_load((folder / template).read_text())["doc_to_text"], keep_trailing_newline=True)

    def question(number: int) -> str:
        options = {"A": "one", "B": "two", "C": "three", "D": "four"}
        text = f"{name} {number}?"
        return ask.render(question=text, Question=text, choices=[*options.values()], **options)

    expected = yaml.safe_load((folder / file).read_text())["description"]
    expected += "".join(f"{question(first + shot)} {answers[shot]}\n\n" for shot in range(5)) + question(0)
    assert _requests(tasks[task], subtask)[:4] == [(expected, f" {letter}") for letter in "ABCD"]


def test_scores_by_hand(tasks: dict[str, EvaluationTask]) -> None:
    """The shortest option is chosen, the first of equals; acc_norm sees the same likelihood a character everywhere."""
    subtasks = {name: task for each in tasks.values() for name, task in each.subtasks.items()}
    samples = {name: indices for each in tasks.values() for name, indices in each.samples.items()}
    results = evaluate(ShortestAnswer(), {"tasks": subtasks}, samples=samples, bootstrap_iters=0)["results"]
    scores = {
        name: [results[subtask][f"{task.metric},none"] for subtask in task.subtasks] for name, task in tasks.items()
    }
    # Of letters the first, A, is chosen: one of C-Eval's is (logic), one of two of MMLU's.
    assert (scores["ceval"], scores["cmmlu"], scores["mmlu"]) == ([0, 1], [0], [0.5])
    # "(A)1" is not right, "(A)甲" is one of two that are, "(A)x" is; the generated text names no number.
    assert scores["agieval"] == [0, 1, 1, 0, 0]
    assert scores["boolq"] == [0.5]  # "no"
    assert scores["axb"] == [0.5]  # "No": a nat a character, so of n + 1 the shorter text has the lesser mean
    assert scores["piqa"] == [0.5 + 0.5]  # the opener and the towel
    assert scores["eprstmt"] == [0.5]  # as long as each other, so the first: negative
    # "the cat ran" shares 2 of its 3 words with 2 of 6, "The cat slept on the mat"; none with the other.
    assert scores["xsum"] == [pytest.approx((2 * (2 / 3) * (2 / 6) / (2 / 3 + 2 / 6) + 0) / 2)]
    assert results["arc_easy"]["acc,none"] == 0.5  # "fire", and "sand", wrongly
    # Every character costs one nat, and the delimiter one more, so the longest option has the least mean.
    assert results["hellaswag"]["acc_norm,none"] == 0
    assert results["hellaswag"]["acc,none"] == 1
    # The first of C3's are the shortest: right for the first question, wrong for the second.
    assert scores["c3"] == [0.5]


def test_the_whole_texts_mean_loss_decides_as_in_opencompass() -> None:
    """After a prompt that costs much a long option has the least mean; of the options alone, the short one."""
    tokens = [14, 19]
    assert 6 / 15 < 9 / 20
    assert (20 + 6) / 15 > (20 + 9) / 20
    assert score_whole_text([-26.0, -29.0], tokens, gold=1) == {"acc_text": 1.0}
    assert score_whole_text([-6.0, -9.0], tokens, gold=1) == {"acc_text": 0.0}


def test_tokens_are_those_of_prompt_and_option_together(tmp_path: Path) -> None:
    counted: list[str] = []

    def count(texts: Sequence[str]) -> list[int]:
        counted.extend(texts)
        return [1, 100]

    [task] = load_tasks(["eprstmt"], write_items(tmp_path), 1, _all_fit, count)
    doc = task.subtasks["eprstmt"].eval_docs[0]
    # Of two tokens in all 10 nats, of 101 tokens 12: the second option, which is right.
    scores = task.subtasks["eprstmt"].process_results(doc, [(-10.0, False), (-12.0, False)])
    assert scores == {"acc_text": 1.0}
    assert counted == ['内容： "很好"。情绪分类：\n消极。', '内容： "很好"。情绪分类：\n积极。']


@pytest.mark.parametrize(
    ("summary", "generated", "one", "two", "longest"),
    [
        ("a b c d", "\n a b c d \nmore", 1, 1, 1),
        # Two of three words, none of two pairs, in the other order: one of them in a row.
        ("a b c", "c a", 2 * (1 * 2 / 3) / (1 + 2 / 3), 0, 2 * (1 / 2 * 1 / 3) / (1 / 2 + 1 / 3)),
        ("Running dogs", "run dog", 0, 0, 0),  # unstemmed
        ("a b", "", 0, 0, 0),
    ],
)
def test_rouge_in_closed_form(summary: str, generated: str, one: float, two: float, longest: float) -> None:
    scores = score_summary({"summary": summary}, [generated])
    assert scores == pytest.approx({"rouge1": one, "rouge2": two, "rougeL": longest})


def test_examples_go_one_by_one_from_the_end_and_then_the_item(tmp_path: Path) -> None:
    """With room for three examples two are dropped, the last two; an item that is longer alone is listed."""
    long = {**FILES["mmlu.jsonl"][0], "question": "why? " * 500}
    write_items(tmp_path, {"mmlu.jsonl": [FILES["mmlu.jsonl"][0], long, FILES["mmlu.jsonl"][1]]})
    asked: list[tuple[int, Sequence[str]]] = []

    def fits(context: str, continuations: Sequence[str]) -> bool:
        asked.append((context.count("Answer:"), continuations))
        return context.count("Answer:") <= 4 and len(context) < 2000

    [task] = load_tasks(["mmlu"], tmp_path, None, fits, _characters)
    assert [count for count, _ in asked] == [6, 5, 4, 6, 5, 4, 3, 2, 1, 6, 5, 4]
    assert asked[0][1] == (" A", " B", " C", " D")
    assert task.samples == {"mmlu_anatomy": [0, 2]}
    assert task.num_shortened == 2
    [listed] = task.unscorable
    assert (listed.task, listed.item) == ("mmlu", "mmlu.jsonl:2")
    assert "longer than the model" in listed.reason
    task.subtasks["mmlu_anatomy"].build_all_requests(samples=task.samples["mmlu_anatomy"])
    prompt = task.subtasks["mmlu_anatomy"].instances[0].args[0]
    assert [f"anatomy {n}?" in prompt for n in range(5)] == [True, True, True, False, False]


def test_a_generated_answer_needs_room_for_all_its_tokens(tmp_path: Path) -> None:
    room = []
    load_tasks(["xsum", "agieval"], write_items(tmp_path), None, lambda _, ends: not room.append(ends), _characters)
    assert (" a" * 100,) in room
    assert (" a" * 32,) in room


def test_unscorable_items_are_counted_within_the_limit(tmp_path: Path) -> None:
    good = FILES["boolq.jsonl"][0]
    changed = [good, {**good, "label": None}, good, {**good, "label": None}]
    write_items(tmp_path, {"boolq.jsonl": changed, "ceval.jsonl": [*FILES["ceval.jsonl"][:2], *[
        {**FILES["ceval.jsonl"][2], "answer": ""}
    ]]})  # fmt: skip
    boolq, ceval = load_tasks(["boolq", "ceval"], tmp_path, 3, _all_fit, _characters)
    assert boolq.samples == {"boolq": [0, 1]}
    assert [(one.item, one.reason) for one in boolq.unscorable] == [("boolq.jsonl:2", "no answer")]
    # A subject of which nothing can be scored is left out, not scored whole.
    assert ceval.samples == {"ceval-valid_accountant": [0, 1]}
    assert [one.item for one in ceval.unscorable] == ["ceval.jsonl:3"]


def test_what_is_refused(tmp_path: Path) -> None:
    write_items(tmp_path, {
        "boolq.jsonl": [{**FILES["boolq.jsonl"][0], "label": None}],
        "cmmlu.jsonl": [{**FILES["cmmlu.jsonl"][0], "subject": "alchemy"}],
        "ceval_dev.jsonl": FILES["ceval_dev.jsonl"][:7],
    })  # fmt: skip
    with pytest.raises(ValueError, match=r"eval\.tasks: unknown task 'bolq'; choose from paper, ablation, ceval, "):
        load_tasks(["bolq"], tmp_path, None, _all_fit, _characters)
    with pytest.raises(ValueError, match=r"cmmlu: unknown subject 'alchemy'; lm-eval knows 67, such as"):
        load_tasks(["cmmlu"], tmp_path, None, _all_fit, _characters)
    with pytest.raises(ValueError, match=r"ceval: 2 solved examples of logic, but prompts need 5"):
        load_tasks(["ceval"], tmp_path, None, _all_fit, _characters)
    with pytest.raises(ValueError, match=r"eval\.data: no folder \S*nowhere"):
        load_tasks(["boolq"], tmp_path / "nowhere", None, _all_fit, _characters)


def test_a_task_of_which_nothing_can_be_scored_says_why_of_each_item(tmp_path: Path) -> None:
    write_items(tmp_path, {"boolq.jsonl": [{**FILES["boolq.jsonl"][0], "label": None}]})
    boolq, axb = load_tasks(["boolq", "axb"], tmp_path, None, lambda *_: False, _characters)
    assert boolq.subtasks == axb.subtasks == {}
    assert [(one.item, one.reason) for one in boolq.unscorable] == [("boolq.jsonl:1", "no answer")]
    reason = "longer than the model's length, even without examples"
    assert [(one.item, one.reason) for one in axb.unscorable] == [("axb.jsonl:1", reason), ("axb.jsonl:2", reason)]


def test_names_of_groups_of_tasks() -> None:
    assert resolve_names(["paper"]) == PAPER
    assert resolve_names(["piqa", "ablation", "piqa"]) == ("piqa", *ABLATION)
    assert ABLATION == ("arc_easy_opencompass", "hellaswag_opencompass", "c3")


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'baber/piqa' on the Hub\nand more")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(ValueError, match=r"^piqa: cannot read baber/piqa from the hub \(Couldn't reach .*Hub\); try"):
        load_tasks(["piqa"], None, None, _all_fit, _characters)


def test_the_hub_is_asked_by_lm_evals_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake data sets in the hub's schemas; labels of -1 are what a hidden test split has."""
    mmlu = {"question": "q?", "subject": "s", "choices": ["a", "b", "c", "d"], "answer": 1}
    rows = {
        ("aps/super_glue", "boolq"): {
            "validation": [{"question": "q", "passage": "p", "idx": n, "label": n - 1} for n in range(3)]
        },
        ("hails/agieval-math", None): {"test": [{"query": "Q: 1+1?\nA: The answer is", "answer": "2"}]},
        ("clue/clue", "c3"): {
            "validation": [{"id": 0, "context": ["x"], "question": "y", "choice": ["a", "b"], "answer": "b"}]
        },
        ("cais/mmlu", "anatomy"): {"test": [mmlu, {**mmlu, "choices": ["a", "", "c", "d"]}], "dev": [mmlu] * 5},
    }
    asked = []

    def load_dataset(path: str, name: str | None = None, **more: Any) -> Any:
        asked.append((path, name))
        found = rows.get((path, name)) or rows["cais/mmlu", "anatomy"]
        return datasets.DatasetDict({split: datasets.Dataset.from_list(part) for split, part in found.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    boolq, c3, mmlu_task = load_tasks(["boolq", "c3", "mmlu"], None, None, _all_fit, _characters)
    assert asked[:2] == [("aps/super_glue", "boolq"), ("clue/clue", "c3")]
    assert {path for path, _ in asked[2:]} == {"cais/mmlu"}
    assert len(asked[2:]) == len(mmlu_task.subtasks) == 57
    assert [(one.item, one.reason) for one in boolq.unscorable] == [("aps/super_glue:validation:0", "no answer")]
    assert boolq.samples == {"boolq": [0, 1]}
    assert _requests(c3)[0] == ("", "文章：x\n问题：y\n答案：a")
    assert mmlu_task.samples["mmlu_anatomy"] == [0]
    assert mmlu_task.unscorable[0].reason == "option B is missing"
    assert [text.text for text in task_texts([c3])] == ["x\ny\na\nb"]


def test_the_command_line_starts_without_lm_eval() -> None:
    code = "import sys, flows.cli, flows.evaluation.task_loading; sys.exit('lm_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@needs_shared
def test_the_public_samples_are_asked_and_scored_whole() -> None:
    tasks = {task.name: task for task in load_tasks([*TASKS], SHARED, None, _all_fit, _characters)}
    counts = {name: (len(task.subtasks), sum(map(len, task.samples.values()))) for name, task in tasks.items()}
    assert counts == {
        "ceval": (52, 208), "cmmlu": (67, 201), "mmlu": (57, 228), "agieval": (21, 210), "boolq": (1, 200),
        "axb": (1, 200), "piqa": (1, 200), "eprstmt": (1, 200), "xsum": (1, 200), "c3": (1, 298),
        "arc_easy_opencompass": (1, 49), "hellaswag_opencompass": (1, 200), "hellaswag": (1, 200), "arc_easy": (1, 200),
    }  # fmt: skip
    # One item of ARC-Easy's development set has five options.
    assert [task.name for task in tasks.values() for _ in task.unscorable] == ["arc_easy_opencompass"]
    assert tasks["c3"].chance == pytest.approx((240 / 4 + 37 / 3 + 21 / 2) / 298)
    assert tasks["arc_easy"].chance == pytest.approx((199 / 4 + 1 / 3) / 200)
    # Prompts put together from the files themselves.
    first = {name: _first(name) for name in ("boolq", "axb", "hellaswag", "xsum", "agieval")}
    expected = {
        "boolq": "{passage}\nQuestion: {question}?\nAnswer:".format(**first["boolq"]),
        "axb": "{sentence1}\n{sentence2}\nIs the sentence below entailed by the sentence above?".format(**first["axb"]),
        "hellaswag": "{activity_label}: {ctx_a} A few women".format(**first["hellaswag"]),
        "agieval": "Q: {question} Answer Choices: ".format(**first["agieval"])
        + " ".join(first["agieval"]["options"])
        + "\nA: Among A through E, the answer is",
    }
    for name, prompt in expected.items():
        harness_task = next(iter(tasks[name].subtasks.values()))
        assert harness_task.fewshot_context(harness_task.eval_docs[0], 0) == prompt


def _first(name: str) -> dict[str, Any]:
    with (SHARED / f"{name}.jsonl").open(encoding="utf-8") as file:
        record: dict[str, Any] = json.loads(file.readline())
    return record
