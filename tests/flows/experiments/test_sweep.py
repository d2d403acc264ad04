"""An architecture search: its arithmetic, its page, concurrent trials and how they stop, and a real search."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from data_scoring.base.files import write_json
from data_scoring.base.parquet import write_parquet
from data_scoring.base.progress import Progress, silent
from flows.cli.main import main
from flows.experiments import sweep
from flows.experiments.search_space import SearchConfig
from flows.experiments.sweep_report import correlations, write_sweep_report
from flows.experiments.sweep_results import open_views, read_trials, write_views
from flows.experiments.trials import TRIAL, TrialStoppedError, read_result, run_all, run_trial
from flows.run.config import RunConfig, parse_config
from flows.run.locks import is_locked
from tests.evaluation_data import write_items
from tests.flows.fakes import FakeRanks, values
from tests.flows.orchestration.place import CONFIG, Place, wait_for
from trainer.jobs import TrainJob


def write_trials(folder: Path, rows: list[dict[str, Any]]) -> None:
    write_json(folder / "sweep.json", SearchConfig(parameters=2_000_000).model_dump())
    write_views(folder)
    for row in rows:
        name = str(row["trial"])
        write_parquet(folder / name / "trial.parquet", pa.Table.from_pylist([row], TRIAL), "")


def trained(
    number: int, depth: int, expansion: float, loss: float, speed: float | None, *scores: float
) -> dict[str, Any]:
    width = 16 * round(40 / depth)
    losses = [{"source": "a", "loss": loss - 1, "num_tokens": 50}, {"source": "b", "loss": loss + 1, "num_tokens": 50}]
    tasks = [
        {"task": task, "score": score, "stderr": 0.125, "chance": 0.5, "num_items": 16, "num_unscorable": 2}
        for task, score in zip(("piqa", "boolq"), scores, strict=False)
    ]
    return {
        "trial": f"t{number:02d}", "state": "trained", "num_layers": depth, "hidden_size": width, "loss": loss,
        "num_attention_heads": width // 16, "ffn_hidden_size": round(expansion * width), "expansion": expansion,
        "num_parameters": 2_000_000 + number, "num_tokens": 1000, "seconds": 2.0, "training_speed": 500.0,
        "losses": losses, "generation_speed": speed, "scores": tasks or None,
    }  # fmt: skip


def make_trials(count: int = 14) -> list[dict[str, Any]]:
    generator = np.random.default_rng(5)
    # Depths and losses with ties, which ranks have to share.
    return [
        trained(number, int(generator.integers(4, 12)), 1 + number / 7, round(float(generator.normal(5, 0.2)), 1),
                float(generator.integers(100, 900)), *generator.integers(0, 17, 2) / 16)
        for number in range(count)
    ]  # fmt: skip


def spearman(x: list[float], y: list[float]) -> float:
    """Return Pearson's correlation of the ranks, ties at their mean, one rank at a time."""
    ranks = [[sum(other < each for other in values) + (values.count(each) + 1) / 2 for each in values]
             for values in (x, y)]  # fmt: skip
    return float(np.corrcoef(*ranks)[0, 1])


def test_correlations_and_the_front_are_those_of_second_implementations(tmp_path: Path) -> None:
    rows = make_trials()
    failed = {"trial": "bad", "state": "failed", "reason": "loss is nan", "num_layers": 40, "hidden_size": 16}
    write_trials(tmp_path, [*rows, failed])
    generator = np.random.default_rng(0)
    with open_views(tmp_path) as views:
        found = {row[:2]: row[2:] for row in correlations(views)}
        seen = {row[:2]: row[2:] for row in
                views.sql("select factor, outcome, correlation, num_trials from correlations").fetchall()}  # fmt: skip
        front = {row[0] for row in views.sql("select trial from pareto").fetchall()}
    outcomes = {
        "quality": [-row["loss"] for row in rows],
        "task score": [sum(part["score"] for part in row["scores"]) for row in rows],
        "generation speed": [row["generation_speed"] for row in rows],
    }
    for factor, column in (("depth", "num_layers"), ("width", "hidden_size"), ("expansion", "expansion")):
        for outcome, results in outcomes.items():
            x, y = [row[column] for row in rows], results
            rho, p, count = found[factor, outcome]
            assert rho == pytest.approx(spearman(x, y)) == seen[factor, outcome][0]
            assert count == seen[factor, outcome][1] == len(rows)
            shuffled = [abs(spearman(x, list(generator.permutation(y)))) for _ in range(200)]
            assert p == pytest.approx(np.mean(np.array(shuffled) >= abs(rho) - 1e-12), abs=0.1)
    assert list(found)[:3] == sorted(list(found)[:3], key=lambda pair: -abs(found[pair][0]))
    beaten = {
        mine["trial"] for mine in rows for other in rows
        if other["loss"] <= mine["loss"] and other["generation_speed"] >= mine["generation_speed"]
        and (other["loss"], other["generation_speed"]) != (mine["loss"], mine["generation_speed"])
    }  # fmt: skip
    assert front == {row["trial"] for row in rows} - beaten
    assert 1 <= len(front) < len(rows)


def test_the_page_says_what_to_take_and_why(config: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    rows = [
        trained(1, 4, 2.0, 5.10, 900.0), trained(2, 10, 2.0, 5.00, 300.0),
        trained(3, 8, 1.5, 5.02, 400.0), trained(4, 8, 4.0, 5.30, 200.0),
    ]  # fmt: skip
    write_trials(folder, [*rows, {"trial": "bad", "state": "failed", "reason": "loss at step 3 is nan"}])
    page = write_sweep_report(folder, config)
    text, content = " ".join(page.text.split()), page.page.read_text()
    # The third is within half a per cent of the second, which is the best, and faster.
    assert "Take 8 layers of width 80, FFN 120 (expansion 1.50): its validation loss, 5.0200, is within 0.5%" in text
    # A batch has 20 sequences.
    assert "it generates fastest: 400.0 tokens/s (20.00 per sequence), against 300.0" in text
    assert "| 5.1000 | 900.0 | 45.00 |" in text
    assert "| generation (tokens/s) | of a sequence (tokens/s) |" in text
    [code] = [part for part in page.text.split("```") if part.startswith("yaml")]
    model = yaml.safe_load(code.removeprefix("yaml"))["model"]
    assert model == {"num_layers": 8, "hidden_size": 80, "ffn_hidden_size": 120, "num_attention_heads": 5}
    RunConfig.model_validate({"model": model})
    assert "| depth with quality | +" in text and "+0.528 |" in text and "4 trials are few" in text
    assert "4 models of 2,000,001 to 2,000,004 parameters (requested: 2,000,000)" in text and "1 failed" in text
    assert "| bad | loss at step 3 is nan |" in text
    assert content.count("data:image/png;base64,") == 2 and "http" not in content
    assert (folder / "sweep-factors.png").exists() and "![" in (folder / "sweep.md").read_text()
    assert "tasks (%)" not in text and "Scores in tasks" not in text
    # With scores, the paper's figure is beside what it is of.
    scored = [trained(1, 4, 2.0, 5.10, None, 0.5, 0.5625), trained(2, 10, 2.0, 5.00, None, 0.625, 0.5)]
    scored.append(trained(3, 8, 1.5, 5.02, None, 0.5, 0.5))
    write_trials(tmp_path / "scored", scored)
    text = " ".join(write_sweep_report(tmp_path / "scored", config).text.split())
    assert "| depth with quality | +1.000 | 0.33 | 3 | |" in text
    assert "| depth with task score | +0.500 | 1 | 3 | +0.528 |" in text
    assert "Items: 16 of BoolQ (2 more could not be scored), 16 of PIQA (2 more could not be scored)." in text
    assert "| chance | 50.0 | 50.0 | 50.0 |" in text
    assert "| 10×64×128 | 50.0 ± 12.5 | **62.5** ± 12.5 | **56.2** ± 8.8 |" in text
    # Without speeds it is the best, and there is no front.
    alone = tmp_path / "alone"
    write_trials(alone, [{**row, "generation_speed": None} for row in rows])
    text = write_sweep_report(alone, config).text
    assert "Take 10 layers of width 64, FFN 128 (expansion 2.00): it has the lowest validation loss, 5.0000." in text
    assert "front" not in text and "generation speed" not in text
    # And with nothing yet, nothing is made up.
    write_trials(tmp_path / "none", [])
    assert "No trial has been trained; 0 failed." in write_sweep_report(tmp_path / "none", config).text


def by_depth(job: TrainJob, run: str) -> tuple[float, float]:
    return 6 - job.model.num_layers / 10, 4 - job.model.num_layers / 10


def test_trials_leave_rows_and_are_not_done_twice(config: RunConfig, fakes: FakeRanks) -> None:
    fakes.losses = by_depth
    config = config.model_copy(update={"train": config.train.model_copy(update={"max_tokens": 600})})
    search = SearchConfig(parameters=60_000, trials=3, min_depth=2, max_depth=6)
    corpus = sweep.begin(config, search, silent)
    trials = sweep.plan(config, search, corpus.corpus().vocab_size)
    fakes.fails_at = f"{trials[1].name} train-1"
    run_trial(trials[0], corpus, silent)
    with pytest.raises(ValueError, match="killed"):
        run_trial(trials[1], corpus, silent)
    write_views(sweep.sweep_folder(config))
    assert sweep.measure(trials[0], silent) and not sweep.measure(trials[0], silent)
    assert not sweep.measure(trials[1], silent)
    row, model = read_result(trials[0]), trials[0].model
    depth = model.num_layers
    assert (row["state"], row["num_layers"], row["num_parameters"]) == ("trained", depth, model.num_parameters(280))
    assert row["loss"] == pytest.approx(5.5 - depth / 10)  # 300 tokens of a and 100 of b
    assert [part["loss"] for part in row["losses"]] == pytest.approx([6 - depth / 10, 4 - depth / 10])
    assert 500 < row["num_tokens"] <= 600 and row["seconds"] == pytest.approx(row["num_tokens"] / 100)
    assert row["generation_speed"] == pytest.approx(1000 / depth)
    failed = read_result(trials[1])
    assert (failed["state"], failed["reason"], failed["loss"]) == ("failed", "killed", None)
    first, base = (run / "corpus" / "shard-0000.bin" for run in (trials[0].folder, corpus.folder))
    assert first.stat().st_ino == base.stat().st_ino
    fakes.jobs, fakes.fails_at = [], ""
    for trial in trials:
        run_trial(trial, corpus, silent)
    assert fakes.jobs == [f"{trial.name} train-1" for trial in trials[1:]]
    assert read_result(trials[0]) == row and read_result(trials[1])["reason"] is None
    with duckdb.connect(str(sweep.sweep_folder(config) / "sweep.duckdb"), read_only=True) as views:
        assert views.sql("select count(*), count(quality) from trials").fetchall() == [(3, 3)]
    # More trials of the same search go on; another search does not mix with them.
    sweep.begin(config, search.model_copy(update={"trials": 4, "jobs": 2}), silent)
    with pytest.raises(ValueError, match=r"holds another search \(parameters 60000 there, 70000 here\); set another"):
        sweep.begin(config, search.model_copy(update={"parameters": 70_000}), silent)
    other = config.model_copy(update={"train": config.train.model_copy(update={"max_tokens": 700})})
    with pytest.raises(ValueError, match=r"another configuration \(train.max_tokens: 600 there, 700 here\)"):
        sweep.begin(other, search, silent)
    # Whoever looks at the views with another program locks them, and holds up nothing.
    holder = subprocess.Popen(
        [sys.executable, "-c", "import duckdb, sys; c = duckdb.connect(sys.argv[1]); print(1, flush=True); input()",
         str(sweep.sweep_folder(config) / "sweep.duckdb")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout is not None and holder.stdout.readline()
    assert len(read_trials(sweep.sweep_folder(config))) == 3
    holder.communicate(b"\n")


def test_scores_are_added_to_a_trial_s_row(config: RunConfig, fakes: FakeRanks, tmp_path: Path) -> None:
    data = write_items(tmp_path / "items")
    config = parse_config(
        {
            **config.model_dump(),
            "corpus": {**config.corpus.model_dump(), "seq_length": 512},
            "eval": {"tasks": ["piqa", "boolq"], "data": str(data)},
        },
        "test",
    )
    search = SearchConfig(parameters=60_000, trials=2, min_depth=2, max_depth=6)
    corpus = sweep.begin(config, search, silent)
    trial, other = sweep.plan(config, search, corpus.corpus().vocab_size)
    run_trial(trial, corpus, silent)
    assert sweep.score(trial, silent) and not sweep.score(trial, silent)
    assert fakes.asked == ["piqa", "boolq"]
    row = read_result(trial)
    # As test_evaluation has them: what takes the shorter option is right in both questions of one, in one of the other.
    assert [(part["task"], part["score"], part["num_items"]) for part in row["scores"]] == [
        ("piqa", 1.0, 2), ("boolq", 0.5, 2)
    ]  # fmt: skip
    write_views(sweep.sweep_folder(config))
    assert read_trials(sweep.sweep_folder(config))[0]["tasks (%)"] == 75
    # Of a trial that ranks could not be asked about, its row says why.
    run_trial(other, corpus, silent)
    fakes.fails_at = f"{other.name} evaluate-1"
    with pytest.raises(ValueError, match="killed"):
        sweep.score(other, silent)
    assert (read_result(other)["scores"], read_result(other)["reason"]) == (None, "killed")
    fakes.fails_at = ""
    assert sweep.score(other, silent) and read_result(other)["reason"] is None
    # A folder that is not there is better known before hours of training.
    values = config.model_dump()
    values["eval"]["data"] = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="nowhere"):
        sweep.begin(parse_config(values, "test"), search, silent)


def test_rows_of_earlier_versions_have_no_scores(tmp_path: Path) -> None:
    write_trials(tmp_path, make_trials(2))
    [row] = pq.read_table(tmp_path / "t00" / "trial.parquet").drop_columns("scores").to_pylist()
    table = pa.Table.from_pylist([row], TRIAL.remove(TRIAL.get_field_index("scores")))
    write_parquet(tmp_path / "t00" / "trial.parquet", table, "")
    assert {row["trial"]: row["tasks (%)"] is None for row in read_trials(tmp_path)} == {"t00": True, "t01": False}


def test_the_budget_counts_the_model_s_vocabulary(config: RunConfig) -> None:
    """A vocabulary larger than the tokenizer's is the one that is trained."""
    config = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": 1000})})
    for trial in sweep.plan(config, SearchConfig(parameters=80_000, trials=3, min_depth=2, max_depth=6), 280):
        assert abs(trial.model.num_parameters(1000) / 80_000 - 1) <= 0.03


def test_work_runs_at_once_within_the_limit_and_stops_together() -> None:
    running, most, told = 0, 0, []
    lock = threading.Lock()

    def piece(progress: Progress) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        for step in range(10):
            progress("training (steps) · loss 3", step, 10)
            time.sleep(0.02)
        with lock:
            running -= 1

    def listen(what: str, done: int, total: int | None) -> None:
        told.append((what, done, total))

    run_all({f"t{number}": piece for number in range(5)}, 2, "trials", listen)
    assert most == 2 and told[-1] == ("trials", 5, 5)

    ends: list[str] = []

    def endless(progress: Progress) -> None:
        try:
            while True:
                progress("training (steps)", 1, 4)
                time.sleep(0.01)
        except TrialStoppedError:
            ends.append("stopped")
            raise

    def refuse(what: str, done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_all({f"t{number}": endless for number in range(4)}, 2, "trials", refuse)
    assert len(ends) == 2 and time.monotonic() - started < 3

    def fail(progress: Progress) -> None:
        raise OSError(28, "No space left on device")

    ends.clear()
    with pytest.raises(OSError, match="No space"):
        run_all({"a": endless, "b": fail}, 2, "trials", listen)
    assert ends == ["stopped"]

    def until_told(progress: Progress) -> None:
        deadline = time.monotonic() + 20
        while ("trials · a: training (steps) 25%", 0, 1) not in told:
            progress("training (steps) · loss 3", 1, 4)
            assert time.monotonic() < deadline
            time.sleep(0.01)

    run_all({"a": until_told}, 1, "trials", listen)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parameters", "1e3"], "--parameters: 1,000 is less than the smallest model of these ranges has, "),
        (["--parameters", "6e4", "--depth", "two"], "--depth: 'two' is not a range; write MIN-MAX, such as 9-40"),
        (["--parameters", "6e4", "--depth", "9-4"], "--depth: 9-4 ends before it begins; swap the two"),
        (["--parameters", "6e4", "--expansion", "1-99"], "--expansion: Input should be less than or equal to 64"),
        (["--parameters", "6e4", "--jobs", "0"], "--jobs: 0 is less than 1; raise it"),
    ],
)
def test_mistakes_are_named(
    texts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values(texts, tmp_path)))
    if "1e3" in arguments:
        # What the flow would begin with, without a server for it.
        search = SearchConfig(parameters=1000)
        with pytest.raises(ValueError, match=message):
            sweep.begin(parse_config(values(texts, tmp_path), "test"), search, silent)
    else:
        assert main(["sweep", str(tmp_path / "config.yaml"), *arguments]) == 1
        assert capsys.readouterr().err.startswith(f"error: {message}")
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml"}


def start(folder: Path, name: str, jobs: int) -> subprocess.Popen[bytes]:
    arguments = ["--parameters", "4e4", "--depth", "1-3", "--tokens", "6000", "--trials", "3", "--jobs", str(jobs)]
    arguments = ["sweep", str(folder / "config.yaml"), "--set", f"name={name}", *arguments, "--no-generation"]
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli.main", *arguments],
        env={**os.environ, "PREFECT_HOME": str(folder / "prefect")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors


def found(folder: Path) -> list[tuple[Any, ...]]:
    columns = "trial, state, num_parameters, num_tokens, num_steps, loss, losses"
    with open_views(folder) as views:
        return views.sql(f"select {columns} from trials order by trial").fetchall()


@pytest.fixture(scope="module")
def unbroken(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a real search that nothing happened to, beside which others are made."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "config.yaml").write_text(yaml.safe_dump(values(texts, folder)))
    finish(start(folder, "unbroken", 1))
    return folder / "unbroken-sweep"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_real_search_is_stopped_and_finished_and_equals_an_unbroken_one(
    unbroken: Path, number: signal.Signals
) -> None:
    name = number.name.lower()
    folder = unbroken.with_name(f"{name}-sweep")
    process = start(unbroken.parent, name, 2)
    wait_for("a trial", lambda: any(folder.glob("depth*/trial.parquet")))
    assert process.poll() is None
    # Where these tests were started in the background of a script, nobody heeds Ctrl-C.
    is_heeded = number != signal.SIGINT or signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    process.send_signal(number if is_heeded else signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode not in (0, 1)
    done = {path: path.stat().st_mtime_ns for path in folder.glob("depth*/rounds/1/train.json")}
    assert 1 <= len(done) < 3
    finish(start(unbroken.parent, name, 2))
    assert all(path.stat().st_mtime_ns == written for path, written in done.items())
    assert found(folder) == found(unbroken) and len(found(folder)) == 3
    assert "## Recommendation" in (folder / "sweep.md").read_text()


@pytest.mark.slow
def test_a_submitted_search_is_cancelled_and_goes_on(place: Place) -> None:
    config = {**CONFIG, "name": "found", "parallel": {}, "train": {**CONFIG["train"], "max_tokens": 20_000}}
    search = {"parameters": 60_000, "trials": 2, "min_depth": 1, "max_depth": 4, "jobs": 2, "generation": False}
    run = place.submit(config, "sweep/sweep", search=search)
    wait_for("two trials at once", lambda: len(place.ranks()) == 2)
    folder = place.folder / "runs" / "found-sweep"
    wait_for("training", lambda: list(folder.glob("depth*/rounds/1/checkpoint/step-*")))
    started = time.monotonic()
    place.cancel(run)
    wait_for("the ranks' end", lambda: not place.ranks(), 30)
    print(f"cancel to the last rank's end: {time.monotonic() - started:.1f} s")
    place.wait(run, "Cancelled", 60)
    wait_for("the lock", lambda: not is_locked(folder))
    run = place.submit(config, "sweep/sweep", search=search)
    place.wait(run, "Completed")
    artifacts = place.artifacts(run)
    tables = [json.loads(each["data"]) for each in artifacts if each["key"] == "found-sweep-trials"]
    assert any(len(rows) == 2 and all(row["state"] == "trained" and row["loss"] for row in rows) for rows in tables)
    [page] = [each["data"] for each in artifacts if each["key"] == "found-sweep-report"]
    assert "## Recommendation" in page
    tasks = place.ask("task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
    states = {task["name"]: task["state"]["name"] for task in tasks}
    assert len([name for name in states if name.startswith("train depth")]) == 2 and set(states.values()) == {
        "Completed"
    }
