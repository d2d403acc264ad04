"""A task that a file of its own adds, as far as a task goes: configuration, items, requests, scores, tables."""

import json
from pathlib import Path

import pytest

from data_scoring.base.progress import silent
from data_scoring.config import EvalConfig
from data_scoring.evaluation.items import evaluation_texts, item_files, read_items
from data_scoring.evaluation.tasks import ABLATION_AVERAGE, AVERAGE, PAPER, TASKS, Task, columns, resolve_names
from data_scoring.sandboxed_query import ask
from flows.cli.main import main
from flows.evaluation.questions import check_items
from flows.run.config import parse_config
from flows.run.folder import open_run
from flows.stages.stage_order import complete
from tests.data_scoring.evaluation.weather_task import DEFINITION, WEATHER
from tests.evaluation_data import write_items
from tests.flows.fakes import fake_ranks, values, write_texts
from trainer.requests import Likelihood, read_requests, requests_path

QUESTION = {"a": "wet.", "b": "dry, as ever and ever.", "answer": "a"}
# Of the three that have an answer, the shorter option is right in two.
RECORDS = [
    {"question": "What of the rain?", **QUESTION},
    {"question": "What of the sun?", **QUESTION, "answer": "b"},
    {"question": "What of the fog?", **QUESTION, "answer": None},
    {"question": "What of the snow?", "a": "warm, as ever and ever.", "b": "cold.", "answer": "b"},
]


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> Task:
    monkeypatch.setitem(TASKS, WEATHER.name, WEATHER)
    return WEATHER


def write_weather(folder: Path, more: str = "") -> Path:
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
    (write_items(folder) / "weather.jsonl").write_text(lines + more)
    return folder


def test_the_configuration_takes_it_and_lists_it(added: Task) -> None:
    assert EvalConfig(tasks=("paper", "weather")).tasks == ("paper", "weather")
    assert resolve_names(["paper", "weather"]) == (*PAPER, "weather")
    assert "weather" not in PAPER
    schema = EvalConfig.model_json_schema()["properties"]
    for field in ("tasks", "training_tasks"):
        assert schema[field]["items"]["examples"] == ["paper", "ablation", *TASKS]
    assert [column.name for column in columns()] == [
        *PAPER, AVERAGE, "arc_easy_opencompass", "hellaswag_opencompass", ABLATION_AVERAGE, "hellaswag", "arc_easy",
        "weather",
    ]  # fmt: skip


def test_without_it_the_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"eval\.tasks: unknown task 'weather', neither Reprise's \(paper, ablation, "):
        check_items(EvalConfig(tasks=("weather",)))
    with pytest.raises(
        ValueError, match=r"eval\.tasks\.0: name a task, of letters, digits and _ \+ - \. \( \), or give"
    ):
        parse_config({"eval": {"tasks": ["the weather"]}}, "test")


def test_its_items_are_read_and_what_is_broken_is_named(added: Task, tmp_path: Path) -> None:
    items = read_items("weather", write_weather(tmp_path))
    assert [(item.place, item.defect) for item in items] == [
        ("weather.jsonl:1", None), ("weather.jsonl:2", None), ("weather.jsonl:3", "no answer"),
        ("weather.jsonl:4", None),
    ]  # fmt: skip
    assert items[3].row == {
        "question": "What of the snow?", "options": ["warm, as ever and ever.", "cold."], "label": 1,
    }  # fmt: skip
    assert item_files(["weather"], tmp_path) == [tmp_path / "weather.jsonl"]
    text = next(evaluation_texts(["weather"], tmp_path))
    assert (text.item, text.text) == ("weather.jsonl:1", "What of the rain?\nwet.\ndry, as ever and ever.")
    for line, said in (
        ('{"question": "q", "a": "x", "b": "y", "answer": "c"}', "answer 'c' is neither a nor b; repair the answer"),
        ('{"question": "q", "a": "x", "answer": "a"}', "no field 'b'; write it, or leave the item out"),
    ):
        write_weather(tmp_path, line)
        with pytest.raises(ValueError) as error:
            read_items("weather", tmp_path)
        assert str(error.value) == f"{tmp_path}/weather.jsonl:5: {said}"


def test_it_is_asked_scored_and_has_a_column(
    added: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes = fake_ranks(monkeypatch)
    given = values(write_texts(tmp_path), tmp_path / "runs")
    given["corpus"] |= {"seq_length": 512}
    given["eval"] = {"tasks": ["weather", "piqa"], "data": str(write_weather(tmp_path / "items"))}
    run = open_run(parse_config(given, "test"))
    complete(run, "prepare", 0, silent)
    complete(run, "mix", 1, silent)
    complete(run, "train", 1, silent)
    complete(run, "evaluate", 1, silent)
    assert fakes.asked == ["weather", "piqa"]
    # Three questions of two options.
    requests = read_requests(requests_path(run.folder / "evaluation", "weather"))
    assert [type(request) for request in requests] == [Likelihood] * 6
    # The shorter option is the likelier one for these ranks.
    [row] = ask(
        run.folder, "select score, chance, num_items, num_unscorable from scores where task = 'weather'"
    ).fetchall()
    assert row == (pytest.approx(2 / 3), 0.5, 3, 1)
    assert main(["evaluate", str(run.folder), "--format", "markdown"]) == 0
    printed = capsys.readouterr()
    assert "| model | Reasoning: PIQA | Outside: Weather |" in printed.out
    assert "| x, round 1 | 100.0 ± 0.0 | 66.7 ± 33.3 |" in printed.out
    assert "weather: 1 unscorable, no answer (such as weather.jsonl:3)" in printed.err
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    assert "arc_easy, weather" in " ".join(capsys.readouterr().out.split())


def test_a_row_has_one_definition() -> None:
    common = {"name": "x", "title": "X", "group": "", "schema": WEATHER.schema, "files": WEATHER.files}
    for fields in ({}, {"folder": "piqa", "definition": DEFINITION}):
        with pytest.raises(ValueError, match="x: needs either folder or definition; give one of them"):
            Task(**common, **fields)
