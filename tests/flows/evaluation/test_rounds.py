"""Evaluation of a run: scores by hand in the ledger, the table and the report; nothing is asked twice."""

import statistics
from pathlib import Path
from typing import Any

import duckdb
import pytest

from data_scoring.base.progress import silent
from data_scoring.config import EvalConfig
from data_scoring.ledger import open_ledger, refresh_ledger
from data_scoring.sandboxed_query import ask
from flows.cli.main import main
from flows.evaluation import rounds
from flows.evaluation.rounds import RoundEvaluation, training_questions
from flows.evaluation.scores import _combine, _standard_error
from flows.experiments.arms import init_comparison
from flows.experiments.compare import compare
from flows.launch import launcher
from flows.report.curves import read_score_curves
from flows.report.run_report import write_report
from flows.report.tables import evaluation_page
from flows.run.config import RunConfig, parse_config
from flows.run.folder import Run, open_run
from flows.stages.evaluate import evaluate_otherwise
from flows.stages.stage_order import complete, fingerprint_of, stages_of
from flows.stages.status import read_status
from tests.evaluation_data import write_items
from tests.flows.evaluation.task_folder import write_tasks
from tests.flows.fakes import FakeRanks, values

# Of the made-up items, what a model scores that takes the option with the fewest tokens, of equal ones the first.
# C-Eval: A, right in the only question of logic and in none of two of accountant: a mean over subjects.
# BoolQ: "no", right in one of two. PIQA: the shorter one, right in both.
SCORES = {"ceval": 0.5, "boolq": 0.5, "piqa": 1.0}
# logic's one question varies as accountant's do, which is not at all.
STDERR = {"ceval": 0.0, "boolq": 0.5, "piqa": 0.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_items(tmp_path_factory.mktemp("items"))


def configure(texts: Path, output: Path, data: Path, **fields: Any) -> RunConfig:
    given = values(texts, output)
    given["corpus"] |= {"seq_length": 512}
    given["eval"] = {"tasks": list(SCORES), "data": str(data), **fields}
    return parse_config(given, "test")


def train(config: RunConfig) -> Run:
    run = open_run(config)
    complete(run, "prepare", 0, silent)
    complete(run, "mix", 1, silent)
    complete(run, "train", 1, silent)
    return run


def test_scores_are_in_the_ledger_and_nothing_is_asked_twice(
    texts: Path, tmp_path: Path, data: Path, fakes: FakeRanks
) -> None:
    run = train(configure(texts, tmp_path, data))
    assert complete(run, "evaluate", 1, silent)
    assert fakes.asked == list(SCORES)
    assert not complete(run, "evaluate", 1, silent)
    rows = ask(run.folder, "select task, score, stderr, num_items, is_end from scores where subject is null").fetchall()
    assert {task: score for task, score, *_ in rows} == SCORES
    assert {task: stderr for task, _, stderr, *_ in rows} == STDERR
    assert {task: count for task, _, _, count, _ in rows} == {"ceval": 3, "boolq": 2, "piqa": 2}
    assert all(is_end for *_, is_end in rows)
    subjects = ask(run.folder, "select subject, score from scores where subject is not null").fetchall()
    assert sorted(subjects) == [("ceval-valid_accountant", 0.0), ("ceval-valid_logic", 1.0)]
    items = ask(run.folder, "select task, item from scored_items where score = 1 order by all").fetchall()
    assert items == [("boolq", "boolq.jsonl:2"), ("ceval", "ceval.jsonl:3"), ("piqa", "piqa.jsonl:1"),
                     ("piqa", "piqa.jsonl:2")]  # fmt: skip
    assert [row.state for row in read_status(run.folder) if row.name == "evaluate 1"] == ["done"]
    # A task that lost its answers is asked again, alone; another task is asked for the first time.
    (folder,) = run.round_folder(1).glob("evaluation/step-*")
    (folder / "boolq.parquet").unlink()
    assert main(["evaluate", str(run.folder), "--tasks", "boolq"]) == 1
    (folder / "files.json").unlink()
    fakes.asked.clear()
    assert main(["evaluate", str(run.folder), "--tasks", "boolq,piqa,axb"]) == 0
    assert fakes.asked == ["boolq", "axb"]


def test_an_evaluation_that_is_killed_after_its_answers_is_no_damage(
    texts: Path, tmp_path: Path, data: Path, fakes: FakeRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(configure(texts, tmp_path, data))
    complete(run, "evaluate", 1, silent)

    def end(*arguments: Any) -> None:
        fakes(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(launcher, "launch", end)
    fakes.asked.clear()
    with pytest.raises(KeyboardInterrupt):
        evaluate_otherwise(stages_of(run), 1, EvalConfig(tasks=("boolq",), data=str(data), limit=1), silent)
    assert fakes.asked == ["boolq"]
    stages_of(run).verify()


def test_standard_errors_of_means_over_subjects() -> None:
    # Variances of items 0.16 and 0.36, so that a single item's is taken for 0.26.
    found = _combine([(0.2, 4), (0.3, 4), (None, 1)])
    assert found == pytest.approx((0.04 + 0.09 + 0.26) ** 0.5 / 3)
    assert _combine([(None, 1)]) is None
    assert _combine([]) is None
    assert _standard_error([0, 1, 1, 0]) == pytest.approx(statistics.stdev([0, 1, 1, 0]) / 2)


def test_scores_on_the_way_are_drawn_against_tokens(texts: Path, tmp_path: Path, data: Path, fakes: FakeRanks) -> None:
    folder = tmp_path / "two-step-1b"
    config = configure(texts, folder, data, tasks=["piqa"], every_steps=2, training_tasks=["piqa", "boolq"])
    run = train(config)
    complete(run, "evaluate", 1, silent)
    rows = ask(run.folder, "select step, task, score, is_end from scores order by step, task").fetchall()
    num_steps = ask(run.folder, "select max(step) from steps").fetchall()[0][0]
    on_the_way = [(step, task, SCORES[task], False) for step in range(2, num_steps, 2) for task in ("boolq", "piqa")]
    # What is asked on the way is asked at the end, too.
    assert rows == [*on_the_way, (num_steps, "boolq", 0.5, True), (num_steps, "piqa", 1.0, True)]
    page = write_report(run).read_text()
    assert "<h2>Evaluation</h2>" in page
    assert "<td>x, round 1</td><td>50.0 ± 50.0</td><td>100.0 ± 0.0</td>" in page
    assert (run.folder / "report" / "scores.png").stat().st_size > 10_000
    assert "<p>Items: 2 of BoolQ, 2 of PIQA.</p>" in page
    assert "x, round 1 | 50.0 ± 50.0 | 100.0 ± 0.0 |" in evaluation_page(run)
    assert "Items: 2 of BoolQ, 2 of PIQA." in evaluation_page(run)


def test_answers_of_other_inputs_are_forgotten(texts: Path, tmp_path: Path, data: Path, fakes: FakeRanks) -> None:
    config = configure(texts, tmp_path, data, tasks=[], every_steps=2, training_tasks=["piqa"])
    run = train(config)
    folder = run.round_folder(1) / "evaluation"
    steps = {path.parent.parent.name for path in folder.glob("step-*/scores/*.parquet")}
    # What was asked before somebody lowered the limit, and the scores of it, go when training goes on.
    (run.round_folder(1) / "train.json").unlink()
    fewer = open_run(configure(texts, tmp_path, data, tasks=[], every_steps=4, training_tasks=["piqa"], limit=1))
    complete(fewer, "train", 1, silent)
    assert {path.parent.parent.name for path in folder.glob("step-*/scores/*.parquet")} < steps
    assert {row[0] for row in ask(run.folder, "select num_items from scores where subject is null").fetchall()} == {1}


def test_tasks_that_are_not_asked_on_the_way_any_more_leave_the_others_their_points(
    texts: Path, tmp_path: Path, data: Path, fakes: FakeRanks
) -> None:
    both = {"tasks": [], "every_steps": 2, "training_tasks": ["piqa", "boolq"]}
    run = train(configure(texts, tmp_path, data, **both))
    before = ask(run.folder, "select step, score from scores where task = 'piqa' order by step").fetchall()
    run = open_run(configure(texts, tmp_path, data, **both | {"training_tasks": ["piqa"]}))
    RoundEvaluation(run, 1, fingerprint_of(run, "train", 1)).forget_others(training_questions(run, silent))
    refresh_ledger(run.folder)
    assert len(before) > 1
    assert ask(run.folder, "select step, score from scores order by step").fetchall() == before
    assert ask(run.folder, "select distinct task from scored_items").fetchall() == [("piqa",)]


def test_answers_are_scored_while_the_model_trains_on(
    texts: Path, tmp_path: Path, data: Path, fakes: FakeRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(configure(texts, tmp_path, data, tasks=[], every_steps=2, training_tasks=["piqa"]))
    whole = ask(run.folder, "select step, score from scores order by step").fetchall()
    for path in run.round_folder(1).glob("evaluation/step-*/scores/*.parquet"):
        path.unlink()
    refresh_ledger(run.folder)
    assert ask(run.folder, "select count(*) from scores").fetchall() == [(0,)]
    monkeypatch.setattr(rounds, "_SECONDS_BETWEEN_LOOKS", 0)
    progress = RoundEvaluation(run, 1, fingerprint_of(run, "train", 1)).scoring_in_training(
        training_questions(run, silent), silent
    )
    progress("training (steps)", 3, 9)
    assert ask(run.folder, "select step, score from scores order by step").fetchall() == whole


def test_a_right_answer_that_is_corrected_counts_without_asking_again(
    texts: Path, tmp_path: Path, fakes: FakeRanks
) -> None:
    data = write_items(tmp_path / "items")
    run = train(configure(texts, tmp_path, data, tasks=["piqa"], every_steps=2, training_tasks=["piqa"]))
    complete(run, "evaluate", 1, silent)
    (data / "piqa-labels.lst").write_text("1\n1\n")
    assert complete(run, "evaluate", 1, silent)
    # On the way as well, lest a curve be of two keys.
    scores = ask(run.folder, "select is_end, score from scores").fetchall()
    assert len(scores) > 2 and set(scores) == {(True, 0.5), (False, 0.5)}
    assert fakes.asked == ["piqa"]


def test_other_scores_do_not_stand_for_the_run_s_own(
    texts: Path, tmp_path: Path, data: Path, fakes: FakeRanks, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(configure(texts, tmp_path, data, tasks=["piqa"]))
    folder = str(run.folder)
    complete(run, "evaluate", 1, silent)
    # Neither what fails nor what asks other tasks makes the run's own scores anything but done.
    assert main(["evaluate", folder, "--data", str(tmp_path / "nowhere")]) == 1
    assert main(["evaluate", folder, "--tasks", "boolq"]) == 0
    assert {row.name: row.state for row in read_status(run.folder)}["evaluate 1"] == "done"
    capsys.readouterr()
    assert main(["evaluate", folder, "--limit", "1"]) == 0
    assert "the scores of piqa are now for other items than the run's" in capsys.readouterr().err
    states = {row.name: row.state for row in read_status(run.folder)}
    assert (states["train 1"], states["evaluate 1"]) == ("done", "stopped")
    assert ask(run.folder, "select num_items from final_scores where task = 'piqa'").fetchall() == [(1,)]
    assert complete(run, "evaluate", 1, silent)
    assert ask(run.folder, "select num_items from final_scores where task = 'piqa'").fetchall() == [(2,)]


def test_a_round_of_which_nothing_fits_is_listed(texts: Path, tmp_path: Path, data: Path, fakes: FakeRanks) -> None:
    config = configure(texts, tmp_path, data, tasks=["xsum"])
    values = config.model_dump()
    values["corpus"]["seq_length"] = 32
    run = train(parse_config(values, "test"))
    assert complete(run, "evaluate", 1, silent)
    assert fakes.asked == []
    assert ask(run.folder, "select count(*) from final_scores").fetchall() == [(0,)]
    assert ask(run.folder, "select item from unscorable").fetchall() == [("xsum.jsonl:1",), ("xsum.jsonl:2",)]
    assert "longer than the model" in write_report(run).read_text()


def test_the_command_prints_the_table(
    texts: Path, tmp_path: Path, data: Path, fakes: FakeRanks, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(configure(texts, tmp_path, data, tasks=[]))
    folder = str(run.folder)
    chosen = ["--tasks", "piqa,boolq", "--data", str(data)]
    assert main(["evaluate", folder, *chosen, "--format", "markdown", "--reference", "paper"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| model | Knowledge: BoolQ | Reasoning: PIQA | Average |"
    assert lines[2] == "| chance | 50.0 | 50.0 | – |"
    # Quoted rows have places as well.
    assert lines[3] == "| x, round 1 | 50.0 ± 50.0 | **100.0** ± 0.0 | – |"
    assert "| PanGu-π-1.5B Pro (quoted) | 70.6 | <u>79.5</u> | **60.6** |" in lines
    assert not any("inheritance" in line for line in lines)
    ablation = ["--tasks", "ablation", "--data", str(data), "--format", "markdown", "--reference", "paper"]
    assert main(["evaluate", folder, *ablation]) == 0
    lines = capsys.readouterr().out.splitlines()
    head, _, chance, *rows = [[cell.strip(" *<u>/") for cell in line.split("|")] for line in lines]
    places = [head.index(f"Ablation: {name} (OpenCompass)") for name in ("ARC-Easy", "HellaSwag")]
    places += [head.index("Understanding: C3"), head.index("Ablation: Average with C3")]
    # Chance: the mean of twice 1/4, and C3's (1/2 + 1/4) / 2.
    assert [chance[place] for place in places] == ["25.0", "25.0", "37.5", "29.2"]
    [learned] = [row for row in rows if row[1:2] == ["inheritance: Learned (quoted)"]]
    assert [learned[place] for place in places] == ["40.7", "51.8", "51.7", "48.1"]
    assert main(["evaluate", folder, *chosen]) == 0
    assert "x, round 1  50.0 ±50.0  100.0 ±0.0" in capsys.readouterr().out
    assert duckdb.sql(f"select count(*) from '{folder}/rounds/1/evaluation/*/scores/*.parquet'").fetchall() == [(5,)]
    for arguments, message in (
        (["--round", "3"], "--round: '3' is not a trained round of"),
        (["--tasks", "mmlu,squad"], "eval.tasks: unknown task 'squad', neither Reprise's (paper, ablation, ceval"),
        (["--data", str(tmp_path / "nowhere")], "nowhere"),
    ):
        assert main(["evaluate", folder, *chosen, *arguments]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        assert message in error


def test_items_that_are_missing_are_told_before_anything_is_made(
    texts: Path, tmp_path: Path, data: Path, fakes: FakeRanks
) -> None:
    broken = write_items(tmp_path / "items", {"boolq.jsonl": [{"question": "is it", "passage": "x", "label": "maybe"}]})
    with pytest.raises(ValueError, match=r"boolq.jsonl:1: .*maybe"):
        train(configure(texts, tmp_path / "a", broken))
    (broken / "boolq.jsonl").unlink()
    run = configure(texts, tmp_path / "b", broken)
    with pytest.raises(ValueError, match=r"eval.data: no file .*boolq.jsonl"):
        train(run)
    assert not (run.folder / "corpus").exists()
    assert fakes.jobs == []


def test_compared_arms_are_scored(texts: Path, tmp_path: Path, data: Path, fakes: FakeRanks) -> None:
    config = configure(texts, tmp_path, data, tasks=["boolq", "piqa"])
    page = compare(config, init_comparison("constant,gpt2"), 2, None, silent)
    assert fakes.asked == ["boolq", "piqa"] * 4
    lines = " ".join(page.text.split())
    assert "## Scores in tasks" in lines
    assert "| chance | 50.0 | 50.0 | 50.0 |" in lines
    # Two seeds that agree have a standard error of 0.
    assert "| constant | **50.0** ± 0.0 | **100.0** ± 0.0 | **75.0** ± 0.0 |" in lines
    scores = page.page.with_name(f"{page.page.stem}-scores.parquet")
    rows = duckdb.sql(f"select seed, arm, task, score, chance from '{scores}' order by all limit 2").fetchall()
    assert rows == [(0, "constant", "boolq", 0.5, 0.5), (0, "constant", "piqa", 1.0, 0.5)]
    compare(config, init_comparison("constant,gpt2"), 2, None, silent)
    assert len(fakes.asked) == 8
    # Of one seed errors are over items: of 1 and 0, 1/2; of the mean of two tasks, half of that.
    lines = " ".join(compare(config, init_comparison("constant,gpt2"), 1, None, silent).text.split())
    assert "with standard errors over items" in lines
    assert "| constant | **50.0** ± 50.0 | **100.0** ± 0.0 | **75.0** ± 25.0 |" in lines


def test_tasks_of_files_are_in_tables_report_and_curves_on_their_own_scale(
    texts: Path, tmp_path: Path, data: Path, fakes: FakeRanks, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tasks").mkdir()
    folder = write_tasks(tmp_path / "tasks")
    chosen = [str(folder / "next_word.yaml"), str(folder / "texts.yaml")]
    run = train(configure(texts, tmp_path, data, tasks=["piqa", *chosen], every_steps=2, training_tasks=chosen))
    complete(run, "evaluate", 1, silent)
    assert fakes.asked[-3:] == ["piqa", "next_word", "texts"]
    assert not complete(run, "evaluate", 1, silent)
    [(perplexity, chance)] = ask(run.folder, "select score, chance from final_scores where task = 'texts'").fetchall()
    assert perplexity > 1 and chance is None
    page = evaluation_page(run)
    head, _, guess, row, *_ = page.splitlines()
    assert head == "| model | Reasoning: PIQA | Other: next\\_word (acc) | Other: texts (word\\_perplexity) ↓ |"
    assert guess.endswith("| – |") and row.endswith(f"| {perplexity:.3f} |")
    with open_ledger(run.folder) as ledger:
        curves = read_score_curves(ledger)
    assert [*curves] == ["piqa", "next_word", "texts"]
    assert curves["texts"].scores[-1] == perplexity and curves["texts"].chance is None
    assert curves["texts"].title == "texts\nword_perplexity ↓ (not percent)"
    assert curves["next_word"].title == "next_word\nacc"
    assert len(curves["next_word"].scores) > 1
    report = write_report(run).read_text()
    assert "texts (word_perplexity) ↓" in report and "Not in percent: texts (word_perplexity)" in report
    # The stage is repeated when a file of a task changes, and status does not mind one that is gone.
    (folder / "items.jsonl").write_text((folder / "items.jsonl").read_text().replace("model", "text"))
    assert [row.state for row in read_status(run.folder) if row.name == "evaluate 1"] != ["done"]
    (folder / "texts.yaml").unlink()
    assert [row.state for row in read_status(run.folder) if row.name == "train 1"] == ["done"]
    assert main(["evaluate", str(run.folder)]) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith("texts.yaml: no such file or folder; correct the path")
