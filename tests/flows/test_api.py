"""The public API: what it reads is what the files hold, and what it starts is what the command starts."""

import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from flows import api
from flows.cli.main import main
from tests.conftest import MakeOnce, make_documents
from tests.flows.equal_runs import assert_equal_runs
from tests.flows.stages.test_verification import STOPS, make_runs


@pytest.fixture(scope="module")
def folder(make_once: MakeOnce) -> Path:
    """The folder of a run of two rounds on ranks that train nothing."""
    return make_once("verified", make_runs) / STOPS[-1]


def rows_of(pattern: Path) -> list[dict[str, Any]]:
    """Return the rows of Parquet files, each with its shard, without the ledger."""
    return [
        {**row, "shard": int(file.stem.partition("=")[2])}
        for file in sorted(pattern.glob("shard=*.parquet"))
        for row in pq.ParquetFile(file).read().to_pylist()
    ]


def test_losses_are_those_of_the_files(folder: Path) -> None:
    expected = [
        (1, row["shard"], row["sample"], row["num_tokens"], row["loss"]) for row in rows_of(folder / "rounds/1/losses")
    ]
    run = api.open_run(str(folder))
    for relation in (run.losses(), run.losses(1)):
        # The relation keeps its connection.
        gc.collect()
        assert relation.columns == ["round", "shard", "sample", "source", "num_tokens", "loss"]
        found = relation.select("round, shard, sample, num_tokens, loss").fetchall()
        assert sorted(found) == sorted(expected) and expected
    frame, table = run.losses(1).df(), run.losses(1).to_arrow_table()
    total = sum(loss for *_, loss in expected)
    assert frame["loss"].sum() == pytest.approx(total) and sum(table["loss"].to_pylist()) == pytest.approx(total)


def test_losses_as_polars(folder: Path) -> None:
    pytest.importorskip("polars")
    assert api.open_run(folder).losses(1).pl().height == len(rows_of(folder / "rounds/1/losses"))


def test_samples_and_texts_are_those_of_the_corpus(folder: Path) -> None:
    run = api.open_run(folder)
    losses = {(row["shard"], row["sample"]): row["loss"] for row in rows_of(folder / "rounds/1/losses")}
    found = run.samples(count=3, source="a")
    assert [losses[each.shard, each.sample] for each in found] == [each.loss for each in found]
    texts = {path.stem: path.read_text() for path in folder.parent.glob("[ab].jsonl")}
    documents = [json.loads(line)["text"] for line in texts["a"].splitlines()]
    for each in found:
        assert run.text(each.shard, each.sample) == each.text
        assert max(len(part) for part in each.text.split("<|endoftext|>")) > 3
        assert any(document.find(each.text.split("<|endoftext|>")[0].strip("�")) >= 0 for document in documents)
    with pytest.raises(ValueError, match="shard 0 has no sample 100000"):
        run.text(0, 100_000)


def test_the_ledger_is_open_for_any_statement(folder: Path, tmp_path: Path) -> None:
    run = api.open_run(folder)
    ledger = run.ledger()
    ledger.sql(f"copy (select sample_text(shard, sample) as text from samples limit 2) to '{tmp_path}/two.parquet'")
    assert pq.read_table(tmp_path / "two.parquet").num_rows == 2
    steps = pq.read_table(folder / "rounds/2/steps.parquet").num_rows
    assert run.sql("select num_steps from rounds where round = 2").fetchall() == [(steps,)]
    with pytest.raises(ValueError, match=r"no select; .*in Python ledger\(\)"):
        run.sql("create table t (x int)")
    with pytest.raises(ValueError, match=r"not done after 0.2 s; .*in Python timeout_seconds\)"):
        run.sql("select sum(a.range * b.range) from range(1000000) a, range(1000000) b", timeout_seconds=0.2)


def test_errors_of_samples_are_those_of_no_command(folder: Path) -> None:
    run = api.open_run(folder)
    for arguments in (
        {"source": "c"},
        {"where": "los > 1"},
        {"scored_round": 9},
        {"order": "dropped", "scored_round": 9},
    ):
        with pytest.raises(ValueError, match=r"source|where|round") as caught:
            run.samples(**arguments)
        assert "--" not in str(caught.value)


def test_scores_are_those_of_the_final_models(folder: Path) -> None:
    relation = api.open_run(folder).scores()
    assert relation.columns[:4] == ["round", "task", "metric", "score"]
    assert relation.fetchall() == []


def test_runs_and_their_states_are_listed(folder: Path) -> None:
    states = [(status.name, status.state) for status in api.list_runs(folder.parent)]
    assert states == [("prepare", "stopped"), ("score 1", "stopped"), ("train 2", "done")]
    assert api.open_run(folder).status().state == "done"
    assert api.list_runs(folder / "rounds") == []


def write_config(folder: Path) -> Path:
    for name, seed in (("a", 1), ("b", 2)):
        lines = [json.dumps({"text": document}) for document in make_documents(60, seed)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    sources = [{"name": name, "path": str(folder / f"{name}.jsonl")} for name in "ab"]
    config = {
        "name": "tiny",
        "output": str(folder / "runs"),
        "device": "cpu",
        "corpus": {"sources": sources, "seq_length": 32, "num_shards": 2},
        "tokenizer": {"vocab_size": 300},
        "model": {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "ffn_hidden_size": 64},
        "train": {"global_batch_size": 8, "micro_batch_size": 4, "lr": 1e-2},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.parametrize(
    ("target", "overrides", "message"),
    [
        ("nowhere.yaml", {}, "nowhere.yaml: no such file"),
        ("tiny.yaml", {"nmae": "x"}, "nmae"),
        ("tiny.yaml", {"train.lr": -1e-5}, r"train\.lr: .*\(it is -1e-05\)"),
        ("tiny.yaml", {"name": Path}, "overrides: name: .* is no plain value"),
        (".", {}, "not a run folder"),
        (".", {"seed": 1}, "overrides: need a configuration file, not a run folder"),
    ],
)
def test_what_cannot_start_is_told_at_once(
    target: str, overrides: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        api.start_run(target, overrides)
    assert not (tmp_path / "runs").exists()


def test_what_fails_later_is_told_by_waiting(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    missing = f"{tmp_path}/it's 语 missing: [1].jsonl"
    for shows_output in (False, True):
        started = api.start_run(write_config(tmp_path), {"corpus.sources.0.path": missing})
        with pytest.raises(api.RunFailedError, match=r"corpus\.sources\.a\.path: no file matches") as raised:
            started.wait(shows_output=shows_output)
        assert missing in str(raised.value) and "\n" not in str(raised.value)
        out, err = capfd.readouterr()
        assert (out, err) == ("", f"error: {raised.value}\n" if shows_output else "")


def test_a_run_that_is_stopped_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    started = api.start_run(write_config(tmp_path))
    with pytest.raises(TimeoutError, match="it goes on"):
        started.wait(0.5)
    assert started.is_running()
    deadline = time.monotonic() + 60
    while "starting Prefect" not in capfd.readouterr().err and time.monotonic() < deadline:
        with pytest.raises(TimeoutError):
            started.wait(0.1, shows_output=True)
    started.stop()
    assert not started.is_running()
    with pytest.raises(api.RunFailedError, match="stopped"):
        started.wait()


def test_importing_it_is_quick() -> None:
    heavy = "{'torch', 'prefect', 'megatron', 'matplotlib', 'pandas', 'datasets', 'lm_eval'}"
    code = f"import sys, flows.api; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.slow
def test_a_run_that_is_started_is_that_of_the_command(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    overrides = {"output": str(tmp_path / "other"), "train.min_lr": 1e-5, "refine.sampling_rate": 0.4}
    run = api.start_run(config, overrides).wait(300)
    sets = ["--set", "train.min_lr=0.00001", "--set", "refine.sampling_rate=0.4"]
    assert main(["run", str(config), *sets]) == 0
    assert run.config.train.min_lr == 1e-5
    assert_equal_runs(run.folder, tmp_path / "runs" / "tiny")
    assert run.resume().wait(300).status().state == "done"
