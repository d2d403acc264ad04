"""The whole job through the command; killed at every stage it repeats nothing and equals an unbroken run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import duckdb
import httpx
import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray

from benchmarks.operation import run_stages
from benchmarks.plain_model import read_checkpoint
from data_scoring.corpus.python_text import read_python_text
from flows.cli.main import main
from flows.run.config import parse_config
from flows.run.locks import locked
from flows.stages.status import read_status
from tests.conftest import read_rows
from tests.flows.equal_runs import assert_equal_runs
from tests.flows.orchestration.place import Place
from tests.flows.orchestration.web import WEBSOCKET, ask
from tests.forked_ranks import forking
from trainer.checkpoint_folder import list_checkpoints

CONFIG = """
name: run
corpus:
  sources:
    - {name: prose, path: prose.txt, document: paragraph}
    - {name: more, path: more.jsonl}
  seq_length: 32
  num_shards: 12
tokenizer: {vocab_size: 300}
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 2, ffn_hidden_size: 64}
train: {global_batch_size: 4, micro_batch_size: 2, lr: 1.0e-2}
score: {micro_batch_size: 1}
checkpoint: {every_steps: 20}
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workplace")
    topics, docstrings = (list(islice(read_python_text(kind), 25)) for kind in ("topics", "docstrings"))
    (folder / "prose.txt").write_text("\n\n".join(topic.text for topic in topics)[:8_000])
    lines = [json.dumps({"id": number, "text": document.text[:400]}) for number, document in enumerate(docstrings)]
    (folder / "more.jsonl").write_text("\n".join(lines))
    (folder / "config.yaml").write_text(CONFIG)
    return folder


def start(workplace: Path, *arguments: str, server: str | None = None) -> subprocess.Popen[str]:
    """Start `reprise run`, with a temporary Prefect server of its own unless one is named."""
    environment = {**os.environ, "PREFECT_HOME": str(workplace / "alone")}
    if server is not None:
        environment["PREFECT_API_URL"] = server
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli.main", "run", "config.yaml", *arguments],
        cwd=workplace,
        env={**environment, "PYTHONPATH": str(Path.cwd())},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    return out


def kill_when(process: subprocess.Popen[str], is_time: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 900
    while not is_time():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="module")
def served(workplace: Path) -> Iterator[Place]:
    place = Place(workplace, yaml.safe_load(CONFIG))
    place.start()
    yield place
    place.stop()
    assert [" ".join(process.cmdline()) for process in place.processes()] == []


@pytest.fixture(scope="module")
def unbroken(workplace: Path, served: Place) -> Path:
    """A run that nothing happened to, as a deployment; the others are done by the command."""
    run = served.submit({**yaml.safe_load(CONFIG), "name": "unbroken"})
    served.wait(run, "Completed")
    assert_shown(served, run, "unbroken")
    [queue] = served.ask("work_queues/filter", {"work_queues": {"name": {"any_": ["production"]}}})
    assert queue["concurrency_limit"] == 1
    return workplace / "runs" / "unbroken"


def assert_shown(place: Place, run: str, name: str) -> None:
    shown = {artifact["key"]: artifact for artifact in place.artifacts(run)}
    for key in ("round-1-training", "round-1-losses", "round-2-selection", "round-2-training", "round-2-report"):
        assert f"{name}-{key}" in shown
    assert shown[f"{name}-train-1"]["data"] == 100
    assert "training (steps)" in shown[f"{name}-train-1"]["description"]
    assert len(json.loads(shown[f"{name}-round-1-losses"]["data"])) == 12
    assert "data:image/png;base64," in shown[f"{name}-round-2-selection"]["data"]
    link = shown[f"{name}-round-2-report"]["data"].split("(")[1].split(")")[0]
    assert "<title>Reprise: unbroken" in httpx.get(link).text
    tasks = place.ask("task_runs/count", {"flow_runs": {"id": {"any_": [run]}}})
    assert 7 <= tasks <= 12
    wanted = {"event": {"prefix": ["reprise."]}, "occurred": {"since": "2020-01-01T00:00:00Z"}}
    events = place.ask("events/filter", {"filter": wanted})["events"]
    assert {event["event"] for event in events} >= {
        "reprise.score.completed", "reprise.refine.completed", "reprise.round.completed"
    }  # fmt: skip


def test_bad_values_are_refused_at_submission(served: Place) -> None:
    with pytest.raises(AssertionError, match="7 is greater than the maximum of 1"):
        served.submit({"refine": {"sampling_rate": 7}})
    with pytest.raises(AssertionError, match=r"'hardest' is not one of \[.*'loss', .*'random', 'all'"):
        served.submit({"refine": {"policy": "hardest"}})


@pytest.mark.parametrize(
    "headers",
    [{"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "same-site"}],
    ids=str,
)
def test_other_sites_are_refused(served: Place, headers: dict[str, str | None]) -> None:
    report = served.folder / "runs" / "served" / "report.html"
    report.parent.mkdir(exist_ok=True)
    report.write_text("a report")
    flow = json.dumps({"name": "foreign"})
    for sent in (headers, {**headers, "Content-Type": "application/json"}, {**headers, "Content-Type": "text/plain"}):
        assert ask(served.port, "/api/flows/", sent, "POST", flow).status == 403
    for path in ("/api/events/in", "/api/events/out", "/api/logs/out", "/api/task_runs/subscriptions/scheduled"):
        assert ask(served.port, path, {**WEBSOCKET, **headers}).status == 403
        assert ask(served.port, path, WEBSOCKET).status == 101
    for path in ("/", "/api/version", "/ui-settings", "/docs"):
        assert ask(served.port, path, headers).status == 403
    assert ask(served.port + 1, "/served/report.html", headers).status == 403
    assert ask(served.port + 1, "/served/report.html").status == 200
    assert "foreign" not in {flow["name"] for flow in served.ask("flows/filter", {})}


@pytest.mark.parametrize("name", ["command", "env", "working_dir", "env.PATH"])
def test_deployments_cannot_choose_what_the_worker_executes(served: Place, name: str) -> None:
    demo = served.ask("deployments/name/multi-round/demo")
    chosen = {"job_variables": {name: "x"}}
    with pytest.raises(AssertionError, match=f"Additional properties are not allowed .'{name}' was unexpected"):
        served.ask("deployments/", {"name": "bad", "flow_id": demo["flow_id"], "work_pool_name": "reprise", **chosen})
    with pytest.raises(AssertionError, match=f"Additional properties are not allowed .'{name}' was unexpected"):
        served.ask(f"deployments/{demo['id']}/create_flow_run", {"state": {"type": "SCHEDULED"}, **chosen})
    template = served.ask("work_pools/reprise")["base_job_template"]
    assert template["job_configuration"].keys() == {"name", "labels", "stream_output"}


def test_paths_do_not_escape(served: Place) -> None:
    run = served.submit({"name": "escape", "output": "../elsewhere"})
    served.wait(run, "Failed")
    assert "output: '../elsewhere' lies outside the folders that flows may use" in served.message(run)
    assert not (served.folder.parent / "elsewhere").exists()


def test_the_ledger_holds_one_row_a_sample_and_round(unbroken: Path) -> None:
    with duckdb.connect(str(unbroken / "ledger.duckdb"), read_only=True) as ledger:

        def ask(sql: str) -> tuple[object, ...]:
            [row] = ledger.sql(sql).fetchall()
            return tuple(row)

        total, shards = ask("select count(*), count(distinct shard) from samples")
        assert shards == 12
        assert ask("select count(*), count(distinct (shard, sample)) from losses where round = 1") == (total, total)
        assert ask("select count(*), count(distinct (shard, sample)) from seen where round = 1") == (total, total)
        kept = ask("select count(*) from selection where round = 2 and kept")
        assert kept == ask(
            "select sum((count + 1) // 2)::bigint from (select count(*) as count from samples group by shard)"
        )
        assert (
            kept == ask("select count(*) from mix where round = 2") == ask("select count(*) from seen where round = 2")
        )
        assert ask("select count(*) from mix anti join selection using (round, shard, sample) where round = 2") == (0,)
        assert ask("select count(*) from rounds") == (2,)
        first, second = (row[0] for row in ledger.sql("select validation_loss from rounds order by round").fetchall())
        assert second < first
        assert ask("select count(*) from duckdb_columns() where not internal and comment is null") == (0,)
        assert ask("select count(*) from forgetting where round = 1") == (total,)


def test_the_report_is_one_file_with_its_pictures(unbroken: Path) -> None:
    page = (unbroken / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "http" not in page
    assert {path.name for path in (unbroken / "report").iterdir()} == {
        "loss.png", "selection-2.png", "sources-2.png", "forgetting-1.png"
    }  # fmt: skip


def test_two_rounds_in_bfloat16_are_about_those_in_float32(workplace: Path, unbroken: Path) -> None:
    """Round 1 sees the same samples in the same order, and round 2 is drawn with the same random numbers."""
    config = yaml.safe_load(CONFIG)
    for source in config["corpus"]["sources"]:
        source["path"] = str(workplace / source["path"])
    changed = {"name": "half", "output": str(workplace / "runs"), "train": {**config["train"], "precision": "bfloat16"}}
    with forking():
        half = run_stages(parse_config({**config, **changed}, "test"))
    assert {row.state for row in read_status(half)} == {"done"}
    assert (half / "report.html").read_text().count("data:image/png;base64,") == 4
    mix = Path("rounds/1/mix.parquet")
    assert (half / mix).read_bytes() == (unbroken / mix).read_bytes()
    for number in ("1", "2"):
        [checkpoint] = list_checkpoints(half / "rounds" / number / "checkpoint")
        assert {tensor.dtype for tensor in read_checkpoint(checkpoint).values()} == {torch.bfloat16}
    # Rounding leads weights elsewhere, step by step, by much less than samples differ.
    for table in ("losses", "seen"):
        query = f"select loss from {table} where round = 1 order by shard, sample"
        found, expected = (ask_ledger(run, query)[:, 0] for run in (half, unbroken))
        errors = found - expected
        assert 1e-3 < np.sqrt(np.square(errors).mean()) < 0.4 * np.std(expected)
        assert abs(errors.mean()) < 0.04
    validation = [ask_ledger(run, "select validation_loss from rounds order by round") for run in (half, unbroken)]
    np.testing.assert_allclose(*validation, atol=0.1)
    assert validation[0][1] < validation[0][0]
    query = "select kept from selection where round = 2 order by shard, sample"
    kept, expected = (ask_ledger(run, query) for run in (half, unbroken))
    assert kept.sum() == expected.sum()
    assert (kept == expected).mean() > 0.9


def ask_ledger(run: Path, sql: str) -> NDArray[np.float64]:
    with duckdb.connect(str(run / "ledger.duckdb"), read_only=True) as ledger:
        return np.array(ledger.sql(sql).fetchall(), float)


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def test_killed_at_every_stage_it_finishes_and_repeats_nothing(workplace: Path, served: Place, unbroken: Path) -> None:
    run = workplace / "runs" / "run"
    first, second = run / "rounds" / "1", run / "rounds" / "2"
    stages: list[tuple[Callable[[], bool], list[Path]]] = [
        ((first / "checkpoint" / "step-00000020" / "reprise.json").exists, []),
        ((first / "losses" / "shard=0002.parquet").exists, [first / "steps.parquet", first / "train.json"]),
        (lambda: "shard=0002" in read(second / "selection" / "shards.json"), [first / "score.json"]),
    ]
    complete: dict[Path, int] = {}
    for is_time, completed in stages:
        kill_when(start(workplace, server=served.api), is_time)
        # A shard's selection is complete once it is recorded.
        recorded = read(second / "selection" / "shards.json")
        selected = (path for path in second.glob("selection/*.parquet") if path.name in recorded)
        for path in [*completed, *first.glob("losses/*.parquet"), *selected]:
            complete.setdefault(path, path.stat().st_mtime_ns)
        states = [row.state for row in read_status(run)]
        assert states == sorted(states, key=("done", "stopped", "waiting").index)
        assert states.count("stopped") == 1
    assert sum(path.parent.name == "losses" for path in complete) > 0
    finish(start(workplace))
    for path, written in complete.items():
        assert path.stat().st_mtime_ns == written, f"{path} was made again"
    assert_equal_runs(run, unbroken)


def test_status_tells_what_is_done_from_the_folder_alone(unbroken: Path) -> None:
    stages = ["prepare", "mix 1", "train 1", "score 1", "refine 2", "mix 2", "train 2"]
    assert [(row.name, row.state) for row in read_status(unbroken)] == [(stage, "done") for stage in stages]
    (unbroken / "rounds" / "1" / "score.json").rename(unbroken / "hidden")
    with locked(unbroken):
        states = {row.name: row.state for row in read_status(unbroken)}
    (unbroken / "hidden").rename(unbroken / "rounds" / "1" / "score.json")
    assert (states["train 1"], states["score 1"], states["refine 2"]) == ("done", "running", "waiting")


def test_the_same_command_on_a_finished_run_does_nothing(workplace: Path, served: Place, unbroken: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (unbroken / "rounds").rglob("*") if path.is_file()}
    finish(start(workplace, "--set", "name=unbroken", server=served.api))
    assert before == {path: path.stat().st_mtime_ns for path in (unbroken / "rounds").rglob("*") if path.is_file()}


def test_a_round_waits_for_its_approval(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(unbroken.parents[1])
    run = Path(shutil.copytree(unbroken, tmp_path / "run"))
    shutil.rmtree(run / "rounds" / "2")
    content = yaml.safe_load((run / "run.yaml").read_text())
    content["config"]["rounds"]["approval"] = True
    # As a version wrote it that did not know checksums.
    (run / "run.yaml").write_text(yaml.safe_dump({name: content[name] for name in ("config", "versions")}))
    assert main(["refine", str(run), "--dry-run", "--policy", "random", "--sampling-rate", "0.25"]) == 0
    assert "policy random, sampling rate 0.25" in capsys.readouterr().out
    assert (
        main(["refine", str(run), "--round", "2", "--dry-run", "--set", "refine.drop_hardest=0.2", "--policy", "band"])
        == 0
    )
    assert "among the hardest" in capsys.readouterr().out
    assert main(["refine", str(run), "--dry-run", "--set", "seed=2"]) == 1
    assert "can only override refine" in capsys.readouterr().err
    assert not (run / "rounds" / "2").exists()
    assert main(["refine", str(run), "--sampling-rate", "0.25"]) == 1
    assert "--policy, --sampling-rate, --temperature: only valid with --dry-run" in capsys.readouterr().err
    assert main(["refine", str(run)]) == 1
    assert "the selection of round 2 is not approved yet; review it with `reprise refine" in capsys.readouterr().err
    assert {row.name: row.state for row in read_status(run)}["mix 2"] == "waiting"
    assert main(["approve", str(run), "--sampling-rate", "2"]) == 1
    assert "--sampling-rate: Input should be less than or equal to 1 (it is 2.0)" in capsys.readouterr().err
    assert main(["approve", str(run), "--policy", "sql"]) == 1
    assert "error: refine.sql: policy sql needs an expression; give one" in capsys.readouterr().err
    assert main(["approve", str(run), "--sampling-rate", "0.25"]) == 0
    assert main(["refine", str(run)]) == 0
    kept = [row[0] for row in read_rows(run / "rounds" / "2" / "selection", "kept")]
    assert sum(kept) == pytest.approx(len(kept) / 4, abs=12)
    assert len(read_rows(run / "rounds" / "2" / "mix.parquet", "sample")) == sum(kept)
    assert main(["approve", str(unbroken)]) == 1
    assert "round 2 has been trained already" in capsys.readouterr().err
