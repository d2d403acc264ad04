"""Tasks of lm-eval's format: the figures are those of lm-eval's own backend, and mistakes are told in one line."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_scoring.base.progress import silent
from data_scoring.config import EvalConfig
from data_scoring.evaluation.task_files import files_of_task
from data_scoring.ledger import open_ledger
from flows.evaluation.harness_model import open_reader
from flows.evaluation.harness_requests import ask
from flows.evaluation.open_task_loading import load_open_tasks, open_task_texts
from flows.evaluation.questions import check_items
from flows.evaluation.results import columns_of, read_details, read_other_columns, read_other_metrics, read_rows
from flows.evaluation.rounds import RoundEvaluation
from flows.evaluation.task_index import check_names, load_error
from flows.models.hugging_face_models import export_model
from flows.run.allowed_paths import check_section
from flows.run.folder import Run
from tests.conftest import Ranks
from tests.flows.evaluation.task_folder import CHOICES, GENERATED, LAST, ROLLING, UTILS, write_task, write_tasks
from tests.flows.trained_run import make_run
from tests.forked_ranks import forking


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def run(ranks: Ranks, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("runs"), ranks.corpus, trained)


def evaluate(run: Run, *entries: object, **fields: Any) -> None:
    config = EvalConfig(tasks=tuple(map(str, entries)), **fields)
    evaluation = RoundEvaluation(run, 1, "trained")
    with forking():
        evaluation.score(evaluation.ask(config, silent), silent)


def fits(context: str, continuations: object) -> bool:
    return True


@pytest.fixture(scope="module")
def theirs(run: Run, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """lm-eval's own results, with its transformers backend and the exported model."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import dynamic_module_utils

    folder = tmp_path_factory.mktemp("exported") / "model"
    export_model(run.folder, 1, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder.parent / "modules"))
        patch.setenv("DISABLE_MULTIPROC", "1")
        # lm-eval looks for data in the working folder only.
        patch.chdir(tasks)
        model = HFLM(str(folder), device="cpu", dtype="float32", batch_size=4, trust_remote_code=True)
        names = [task["task"] for task in (CHOICES, ROLLING, LAST, GENERATED)]
        found = simple_evaluate(
            model, tasks=names, task_manager=TaskManager(include_defaults=False, include_path=str(tasks)),
            bootstrap_iters=1000, log_samples=True,
        )  # fmt: skip
        assert found is not None
        yield found


def test_the_figures_are_those_of_lm_evals_own_backend(run: Run, tasks: Path, theirs: dict[str, Any]) -> None:
    evaluate(run, tasks)
    with open_ledger(run.folder) as ledger:
        found = ledger.sql("select task, metric, score, stderr, higher_is_better from metrics").fetchall()
        items = dict(ledger.sql("select task, list(score order by item) from scored_items group by task").fetchall())
        columns = {column.name: column for column in read_other_columns(ledger)}
        [row] = read_rows(ledger, "tiny")
        assert len(columns_of([row], [*columns.values()])) == 4
        details = {each["task"]: each for each in read_details(ledger, 1)}
        texts = dict(read_other_metrics(ledger, 1))
    expected = [
        (task, *key.split(",")[:1], value, results[key.replace(",", "_stderr,")])
        for task, results in theirs["results"].items()
        for key, value in results.items()
        if "," in key and "_stderr" not in key
    ]
    assert sorted(each[:2] for each in expected) == sorted(each[:2] for each in found)
    by_name = {each[:2]: each[2:] for each in found}
    for task, metric, value, error in expected:
        score, stderr, is_higher = by_name[task, metric]
        assert score == pytest.approx(value, rel=1e-4), (task, metric)
        assert (error == "N/A" and stderr is None) or stderr == pytest.approx(error, rel=1e-3, abs=1e-6)
        assert is_higher == theirs["higher_is_better"][task][metric]
    # The first metric of each is what tables show, in percent if it is a share.
    assert row.scores == {
        "next_word": 100 * by_name["next_word", "acc"][0], "texts": by_name["texts", "word_perplexity"][0],
        "last_word": by_name["last_word", "perplexity"][0], "copy": 100 * by_name["copy", "exact_match"][0],
    }  # fmt: skip
    assert {name: (each.is_share, each.higher_is_better) for name, each in columns.items()} == {
        "next_word": (True, True), "texts": (False, False), "last_word": (False, False), "copy": (True, True)
    }  # fmt: skip
    assert columns["texts"].title == "texts (word_perplexity)"
    assert texts["texts"].startswith(f"word_perplexity {row.scores['texts']:.4f}, bits_per_byte ")
    chance = [1 / len(sample["doc"]["choices"]) for sample in theirs["samples"]["next_word"]]
    assert details["next_word"]["chance"] == pytest.approx(100 * sum(chance) / 16, abs=0.01)
    assert (details["texts"]["chance"], details["next_word"]["examples"], details["texts"]["items"]) == (None, 1, 16)
    # An item of a text has the metric over itself.
    assert sum(items["next_word"]) == 16 * by_name["next_word", "acc"][0]
    words = [len(sample["doc"]["text"].split()) for sample in theirs["samples"]["texts"]]
    assert len(items["texts"]) == 16 and min(items["texts"]) > 1 and len(words) == 16


def test_a_group_has_lm_evals_mean_and_a_row_for_each_of_its_tasks(run: Run, tmp_path: Path, tasks: Path) -> None:
    write_tasks(tmp_path)
    half = {**CHOICES, "task": "half", "num_fewshot": 0, "process_docs": "utils.half"}
    (tmp_path / "utils.py").write_text(UTILS + "def half(docs):\n    return docs.select(range(4))\n")
    path = write_task(tmp_path, half)
    path.write_text(path.read_text().replace("utils.half", "!function utils.half"))
    (tmp_path / "group.yaml").write_text(
        "group: both\ntask: [next_word, half]\naggregate_metric_list:\n  - {metric: acc, weight_by_size: true}\n"
    )
    evaluate(run, tmp_path / "group.yaml")
    with open_ledger(run.folder) as ledger:
        found = ledger.sql("select subject, score, num_items, chance from scores where task = 'both'").fetchall()
    scores = {subject: (score, count) for subject, score, count, _ in found}
    assert [scores[name][1] for name in (None, "next_word", "half")] == [20, 16, 4]
    assert scores[None][0] == pytest.approx((16 * scores["next_word"][0] + 4 * scores["half"][0]) / 20)
    assert files_of_task(tmp_path / "group.yaml")[0] == tmp_path / "group.yaml"
    assert {path.name for path in files_of_task(tmp_path / "group.yaml")} >= {
        "next_word.yaml",
        "utils.py",
        "items.jsonl",
    }
    # In a folder, what a group names is part of it.
    assert [task.name for task in load_open_tasks(str(tmp_path), None, None, fits)] == [
        "copy",
        "both",
        "last_word",
        "texts",
    ]


def test_a_group_without_a_mean_and_a_limit(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    (tmp_path / "group.yaml").write_text("group: both\ntask: [next_word, texts]\n")
    found = load_open_tasks(str(tmp_path / "group.yaml"), None, 3, fits)
    assert [(task.name, task.samples) for task in found] == [
        ("next_word", {"next_word": [0, 1, 2]}), ("texts", {"texts": [0, 1, 2]})
    ]  # fmt: skip
    [text, *_] = open_task_texts(found[0])
    row = json.loads((tmp_path / "items.jsonl").read_text().splitlines()[0])
    assert (text.task, text.item, text.text) == (
        "next_word", "items.jsonl:test:0", "\n".join([row["question"], *row["choices"]])
    )  # fmt: skip


def test_long_items_lose_examples_or_are_listed(run: Run, tmp_path: Path) -> None:
    write_tasks(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    # Too long for 32 tokens: the second by itself, the third with an example.
    rows[1]["question"] = "the model " * 20
    rows[2]["question"] = "the model learns what text says and where it goes on until loss falls the model learns"
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate(run, tmp_path / "next_word.yaml")
    with open_ledger(run.folder) as ledger:
        [row] = ledger.sql(
            "select num_items, num_unscorable, num_shortened >= 1 from scores where task = 'next_word'"
        ).fetchall()
        listed = ledger.sql("select item, reason from unscorable where task = 'next_word'").fetchall()
        asked = ledger.sql("select item from scored_items where task = 'next_word'").fetchall()
    assert row == (15, 1, True)
    assert listed == [("items.jsonl:test:1", "longer than the model's length, even without examples")]
    assert ("items.jsonl:test:1",) not in asked and ("items.jsonl:test:2",) in asked


ERRORS = {
    "no data": ({"dataset_kwargs": {"data_files": {"test": "nothing.jsonl"}}}, "cannot read its data"),
    "hub": ({"dataset_path": "some/set", "dataset_kwargs": None}, "put the data set's repository some/set there"),
    "type": ({"output_type": "multi_round"}, "Got invalid output_type"),
    "split": ({"test_split": "train"}, "no field or name"),
    "template": ({"doc_to_text": "{{question.nothing.more}}"}, "UndefinedError"),
    "images": ({"doc_to_image": ["image"]}, "asks about images"),
    "code": ({"unsafe_code": True}, "executes code that the model writes"),
    "own name": ({"task": "piqa"}, "the task 'piqa' has the name of one of Reprise's own"),
    "slash": ({"task": "a/b"}, "the task 'a/b' has a name that no file can have"),
    "sampling": (
        {"output_type": "generate_until", "generation_kwargs": {"do_sample": True, "temperature": 1.0}},
        "only greedy generation",
    ),
    "unknown field": ({"metrics": "acc"}, "metrics"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_loaded_is_one_line(name: str, tmp_path: Path) -> None:
    fields, said = ERRORS[name]
    write_tasks(tmp_path)
    path = tmp_path / "task.yaml"
    write_task(tmp_path, CHOICES, **fields).rename(path)
    data = str(tmp_path) if name == "hub" else None
    with pytest.raises(ValueError) as error:
        check_items(EvalConfig(tasks=(str(path),), data=data))
    assert str(error.value).startswith(("eval.tasks: ", "eval.data: "))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("task: [", "not YAML"),
        ("- a", "holds no mapping of fields"),
        ("output_type: x", "defines neither a `task` nor a `group`"),
        ("task: a\ninclude: other.yaml", "other.yaml"),
        ("task: a\ndoc_to_text: !function utils.nothing", "nothing"),
        ("task: a\ndoc_to_text: !function absent.function", "absent"),
    ],
)
def test_a_broken_file_is_one_line(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "utils.py").write_text("")
    (tmp_path / "task.yaml").write_text(content)
    with pytest.raises(ValueError) as error:
        check_items(EvalConfig(tasks=(str(tmp_path / "task.yaml"),)))
    assert said in str(error.value)
    assert str(tmp_path / "task.yaml") in str(error.value) or "other.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_names_that_are_known_and_those_that_are_meant() -> None:
    check_names(["paper", "lambada_openai", "mmlu_pro", "leaderboard"])
    with pytest.raises(ValueError, match=r"unknown task 'lambada_opneai'.*did you mean lambada_openai"):
        check_names(["lambada_opneai"])
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        check_names(["./nowhere"])


def test_a_task_of_lm_evals_own_reads_a_copy_of_its_data_set(tmp_path: Path) -> None:
    place = tmp_path / "EleutherAI" / "lambada_openai"
    place.mkdir(parents=True)
    (place / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: test\n    path: test.jsonl\n---\n"
    )
    (place / "test.jsonl").write_text(json.dumps({"text": "where the model learns"}) + "\n")
    [task] = load_open_tasks("lambada_openai", tmp_path, None, fits)
    assert (task.name, task.metric, task.samples) == ("lambada_openai", "perplexity", {"lambada_openai": [0]})
    with pytest.raises(
        ValueError, match=r"eval\.data: no folder .*/elsewhere/EleutherAI/lambada_openai, which lambada_o"
    ):
        load_open_tasks("lambada_openai", tmp_path / "elsewhere", None, fits)


def test_two_entries_for_one_task_are_refused(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    with pytest.raises(ValueError, match="both have the task 'texts'"):
        check_items(EvalConfig(tasks=(str(tmp_path), str(tmp_path / "texts.yaml"))))


@pytest.mark.parametrize("outside", ["task", "include", "function", "data", "URL", "pattern", "folder"])
def test_flows_of_a_deployment_use_no_task_file_outside_of_their_folders(outside: str, tmp_path: Path) -> None:
    inside, other = tmp_path / "inside", tmp_path / "other"
    for folder in (inside, other):
        folder.mkdir()
        write_tasks(folder)
    path = inside / "texts.yaml"
    check_section(EvalConfig(tasks=(str(path),)), "evaluation.", [inside])
    if outside == "task":
        path = other / "texts.yaml"
    elif outside == "include":
        path.write_text(f"task: texts\ninclude: {other / 'texts.yaml'}\n")
    elif outside == "function":
        (inside / "utils.py").unlink()
        (inside / "utils.py").symlink_to(other / "utils.py")
        path = inside / "copy.yaml"
    else:
        data = str(other / "items.jsonl")
        named = {
            "data": {"data_files": {"test": data}},
            "URL": {"data_files": {"test": f"file://{data}"}},
            "pattern": {"data_files": {"test": "../other/items*"}},
            "folder": {"data_dir": "../other"},
        }
        write_task(inside, ROLLING, dataset_kwargs=named[outside])
    with pytest.raises(ValueError, match=r"evaluation\.tasks\.0: .* lies outside the folders that flows may use"):
        check_section(EvalConfig(tasks=(str(path),)), "evaluation.", [inside])


def test_answers_change_with_the_files_of_a_task(tasks: Path, tmp_path: Path) -> None:
    assert {path.name for path in files_of_task(tasks / "copy.yaml")} == {"copy.yaml", "utils.py", "items.jsonl"}
    assert {path.name for path in files_of_task(tasks / "next_word.yaml")} == {
        "next_word.yaml", "items.jsonl", "shots.jsonl"
    }  # fmt: skip


def test_what_cannot_be_scored_is_named_by_its_place_in_the_data_set(run: Run, tmp_path: Path) -> None:
    write_tasks(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    rows[2]["question"] = "the model " * 20
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    [task] = load_open_tasks(str(tmp_path / "last_word.yaml"), None, None, fits)
    # lm-eval numbers the items that it is asked for: 0, 1, 2.
    asked = ask(replace(task, samples={"last_word": [0, 2, 3]}), open_reader(run))
    assert list(asked.unscorable) == [("last_word", 2)]


LATE = {
    "cannot be asked: division by zero": "def ask(doc):\n    return doc['question'] if doc['answer'] == 0 else 1 / 0\n",
    "cannot be scored: no field or name": "def score(doc, results):\n    raise KeyError('x')\n",
}


@pytest.mark.parametrize("said", LATE)
def test_functions_of_a_task_that_fail_later_are_one_line(run: Run, said: str, tmp_path: Path) -> None:
    rows = [{"question": "a", "answer": number, "choices": ["a", "the"]} for number in (0, 1)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "utils.py").write_text(LATE[said])
    field, name = ("doc_to_text", "ask") if "ask" in LATE[said] else ("process_results", "score")
    without_examples = {key: value for key, value in CHOICES.items() if "fewshot" not in key}
    path = write_task(tmp_path, {**without_examples, field: "FUNCTION"})
    path.write_text(path.read_text().replace("FUNCTION", f"!function utils.{name}"))
    with pytest.raises(ValueError, match=f"^eval.tasks: next_word: {said}") as error:
        evaluate(run, path)
    assert "\n" not in str(error.value)


def test_a_metric_that_lm_eval_does_not_know_is_told() -> None:
    # Its registry then asks the hub, and returns None, which is no key.
    error = load_error("mine", KeyError(None))
    assert str(error).startswith("eval.tasks: mine: cannot be loaded: lm-eval does not know a metric that it names")
    missing = load_error("mine", ModuleNotFoundError("No module named 'langdetect.x'", name="langdetect.x"))
    assert str(missing).startswith("eval.tasks: mine: needs the package langdetect; install it")
