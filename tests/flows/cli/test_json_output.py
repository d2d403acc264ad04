"""`--json`: one strict document in UTF-8 on standard output, whose figures are those of the files and of the text."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from data_scoring.base.files import write_json
from flows.cli.json_output import plain
from flows.cli.main import main
from flows.run.locks import locked
from tests import ROOT
from tests.conftest import MakeOnce
from tests.flows.stages.test_verification import STOPS, make_runs, write_anew


@pytest.fixture(scope="module")
def runs(make_once: MakeOnce) -> Path:
    return make_once("verified", make_runs)


@pytest.fixture
def run(runs: Path, tmp_path: Path) -> Path:
    """A copy of a complete run, in a folder of run folders."""
    return copy(runs / STOPS[-1], tmp_path / "runs" / "x")


def copy(run: Path, target: Path) -> Path:
    return Path(shutil.copytree(run, target))


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def read(output: str) -> Any:
    return json.loads(output, parse_constant=refuse)


def answer(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> tuple[Any, str]:
    """Return the document that a command prints, and its errors."""
    assert main([*arguments, "--json"]) == status
    out, err = capsys.readouterr()
    return read(out), err


def text(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    assert main([*arguments]) == status
    return capsys.readouterr().out


def test_status_has_the_seconds_of_the_records(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, _ = answer(capsys, "status", str(run))
    assert (found["name"], found["folder"], found["state"], found["error"]) == ("x", str(run), "done", None)
    assert [(each["stage"], each["round"]) for each in found["stages"]] == [
        *(("prepare", None), ("mix", 1), ("train", 1), ("score", 1), ("refine", 2), ("mix", 2), ("train", 2))
    ]
    assert found["num_stages"] == found["num_stages_done"] == len(found["stages"])
    for each in found["stages"][1:]:
        record = json.loads((run / "rounds" / str(each["round"]) / f"{each['stage']}.json").read_text())
        assert each["seconds"] == record["seconds"]
    assert (
        text(capsys, "status", str(run)).splitlines()[1] == f"mix 1      done     {found['stages'][1]['seconds']:.0f} s"
    )


def test_status_tells_a_running_stage_s_progress(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy(runs / "score 1", tmp_path / "x")
    write_json(run / "logs" / "progress.json", {"what": "refining", "done": 1234, "total": 5000, "loss": float("nan")})
    with locked(run):
        [row] = [each for each in answer(capsys, "status", str(run))[0]["stages"] if each["state"] == "running"]
        assert "refining: 1,234 of 5,000" in text(capsys, "status", str(run))
    assert (row["stage"], row["round"]) == ("refine", 2)
    assert row["progress"] == {"what": "refining", "done": 1234, "total": 5000, "details": {"loss": None}}


def test_a_damaged_run_hides_no_other(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = copy(run, run.parent / "damaged")
    write_anew(damaged / "run.yaml", b"config: {}\n")
    found, err = answer(capsys, "runs", str(run.parent), status=1)
    assert [(each["name"], each["state"]) for each in found["runs"]] == [("damaged", "unreadable"), ("x", "done")]
    assert err == f"error: {found['runs'][0]['error']}\n" and str(damaged / "run.yaml") in err
    lines = text(capsys, "runs", str(run.parent), status=1).splitlines()
    assert [line.split()[:2] for line in lines] == [["damaged", "unreadable"], ["x", "7"]]
    assert main(["status", str(damaged), "--json"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1


def test_verify_names_every_damaged_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def examined(status: int) -> dict[str, str | None]:
        found, _ = answer(capsys, "verify", str(run), status=status)
        damages = {each["path"]: each["damage"] for each in found["examined"] if each["damage"] is not None}
        assert found["num_damaged"] == len(damages)
        return damages

    # The ranks that train nothing leave checkpoints that are no checkpoints.
    before = examined(1)
    path = run / "rounds" / "2" / "mix.parquet"
    write_anew(path, path.read_bytes() + b"x")
    after = examined(1)
    assert after.keys() - before.keys() == {str(path)}
    assert f"damaged  {after[str(path)]}" in text(capsys, "verify", str(run), status=1).splitlines()


def test_samples_have_their_whole_texts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = {
        (int(file.stem[6:]), row["sample"]): row["loss"]
        for file in (run / "rounds" / "1" / "losses").glob("shard=*.parquet")
        for row in pq.ParquetFile(file).read().to_pylist()
    }
    found, _ = answer(capsys, "samples", str(run), "--hardest", "5")
    assert found["scored_round"] == 1 and len(found["samples"]) == 5
    for each in found["samples"]:
        assert each["loss_nats_per_token"] == losses[each["shard"], each["sample"]]
        assert each["file"].endswith(f"/{each['source']}.jsonl") and each["document"] >= 1
    short, _ = answer(capsys, "samples", str(run), "--hardest", "5", "--chars", "7")
    assert [each["text"] for each in short["samples"]] == [each["text"][:7] for each in found["samples"]]


def test_models_have_their_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    found, _ = answer(capsys, "model", "pangu-pi-1b", "--vocab-size", "100883")
    [model] = found["models"]
    assert model["num_parameters"] == 1_033_246_720 and model["hidden_size"] == 2048
    # Of each entry, 2 x 2048 weights in embedding and head.
    assert model["embedding_share"] == pytest.approx(2 * 2048 * model["vocab_size"] / 1_033_246_720, rel=1e-3)
    assert [each["name"] for each in answer(capsys, "model")[0]["models"]] == [
        line.split("|")[1].strip() for line in text(capsys, "model").splitlines()[2:] if line.startswith("|")
    ]


def test_advice_has_its_figures(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, _ = answer(capsys, "advise", str(run))
    lines = text(capsys, "advise", str(run)).splitlines()
    verdict = found["verdict"]
    assert lines == [verdict["headline"], *(f"- {reason}" for reason in verdict["reasons"]), verdict["advice"]]
    tokens = sum(pq.read_table(run / "corpus" / "samples.parquet")["num_tokens"].to_pylist())
    assert found["facts"]["cost"]["everything_tokens"] == tokens and found["facts"]["round"] == 1


def test_doctor_names_its_checks(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        f"name: x\noutput: {tmp_path}\ndevice: cpu\ncorpus: {{sources: [{{name: a, path: {texts}/a.jsonl}}]}}\n"
    )
    found, _ = answer(capsys, "doctor", str(config))
    checks = {each["check"]: each for each in found["findings"]}
    assert {
        "versions",
        "machine",
        "processes",
        "kernels",
        "tokenizer",
        "source",
        "host_memory",
        "disk",
    } <= checks.keys()
    assert found["num_missing"] == 0 and 0 < checks["disk"]["needed_bytes"] < checks["disk"]["free_bytes"]
    config.write_text(config.read_text().replace("a.jsonl", "missing.jsonl"))
    found, err = answer(capsys, "doctor", str(config), status=1)
    assert [each["check"] for each in found["findings"] if each["state"] == "missing"] == ["source"]
    assert "1 requirement missing" in err


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (float("nan"), None),
        ({"a": [float("inf"), 0.1], 2: -float("inf")}, {"a": [None, 0.1], "2": None}),
        ((Path("x"), True, None, 10**20), ["x", True, None, 10**20]),
    ],
)
def test_values_are_those_of_json(value: Any, expected: Any) -> None:
    assert plain(value) == expected


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_output_is_utf_8_whatever_the_terminal_has(run: Path, encoding: str) -> None:
    renamed = run.rename(run.with_name(os.fsdecode("größe 语 🎉 ".encode() + b"\xff")))
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli.main", "status", "--json", os.fsencode(renamed)],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding},
    )
    assert read(done.stdout.decode())["name"] == "größe 语 🎉 \udcff"
