"""The command on bad input: one line, exit status 1, nothing half-written."""

import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.cli.main import main
from flows.run.config import read_config
from flows.run.folder import Run, open_run
from flows.run.locks import locked
from flows.stages.stage_order import fingerprint_of
from tests.conftest import make_documents
from tests.data_scoring.tokenizer.tokenizer_kinds import make_kind


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"text": document}) for document in make_documents(100)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "config.yaml").write_text(
        "name: x\ncorpus: {sources: [{name: a, path: a.jsonl}], seq_length: 16, num_shards: 4}\n"
        "tokenizer: {vocab_size: 280}\n"
    )
    return tmp_path / "config.yaml"


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(("encoding", "shown"), [("utf-8", "'北'"), ("ascii", r"'\u5317'")])
def test_preparing_tells_what_the_tokenizer_lost(
    encoding: str, shown: str, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [*make_documents(100), "the 北 model"]
    (config.parent / "a.jsonl").write_text("\n".join(json.dumps({"text": document}) for document in documents))
    make_kind("dropping", config.parent)
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", output)
    assert main(["prepare", str(config), "--set", "tokenizer={path: dropping.json}"]) == 0
    output.flush()
    characters = sum(map(len, documents))
    assert output.buffer.getvalue().decode(encoding) == (  # type: ignore[attr-defined]
        f"note: corpus.sources.a: the tokenizer lost 1 of {characters:,} characters, such as {shown}\n"
    )


def test_a_run_made_by_another_configuration_is_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", str(config)]) == 0
    before = (config.parent / "runs" / "x" / "run.yaml").read_bytes()
    assert main(["prepare", str(config), "--set", "seed=1"]) == 1
    assert "this folder was created by another configuration (seed: 0 there, 1 here)" in one_line(capsys)
    assert (config.parent / "runs" / "x" / "run.yaml").read_bytes() == before


def test_a_mistake_can_be_mended_in_the_same_run(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", str(config), "--set", "corpus.sources=[{name: a, path: a.jsonl, text_field: body}]"]) == 1
    assert "a.jsonl:1: no field 'text'" not in one_line(capsys)
    assert main(["prepare", str(config)]) == 0


def test_a_leftover_of_a_killed_process_with_our_number_is_no_hindrance(config: Path) -> None:
    assert main(["prepare", str(config)]) == 0
    run = config.parent / "runs" / "x"
    for name in (f".ledger.duckdb.{os.getpid()}.tmp", f".run.yaml.{os.getpid()}.tmp"):
        (run / name).write_bytes((run / "ledger.duckdb").read_bytes())
    (run / ".report.html.1.tmp").write_text("half")
    assert main(["sql", str(run), "select 1"]) == 0
    assert main(["prepare", str(config)]) == 0
    assert not list(run.glob(".*.tmp"))


def test_a_round_that_is_not_there_is_named(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", str(config)]) == 0
    for stage, number in (("train", 0), ("refine", 1), ("score", 3)):
        assert main([stage, str(config), "--round", str(number)]) == 1
        assert f"--round: {number} is not between" in one_line(capsys)


def test_a_vocabulary_larger_than_the_models_is_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", str(config), "--set", "model.vocab_size=256"]) == 1
    assert "model.vocab_size: 256 is smaller than the tokenizer's vocabulary of 280" in one_line(capsys)
    assert not (config.parent / "runs" / "x" / "corpus").exists()


def test_a_device_that_is_not_there_is_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kernel = ["--set", "device=cpu", "--set", "train.activation_kernel=triton"]
    assert main(["prepare", str(config), *kernel]) == 1
    assert "train.activation_kernel: 'triton' was requested but the device is cpu" in one_line(capsys)
    assert main(["prepare", str(config), "--set", "device=npu"]) == 1
    assert "device: 'npu' was requested but torch-npu is not installed; install" in one_line(capsys)


def test_a_stage_out_of_turn_is_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", str(config)]) == 1
    assert "holds no complete corpus; run `reprise prepare`" in one_line(capsys)
    assert main(["prepare", str(config)]) == 0
    assert main(["score", "runs/x"]) == 1
    assert "train of round 1 is not complete" in one_line(capsys)


def test_sql_prints_a_table_and_names_mistakes(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", str(config)]) == 0
    assert main(["sql", "runs/x", "select source, count(*) as samples from samples group by all"]) == 0
    assert "samples" in capsys.readouterr().out
    assert main(["sql", "runs/x", "select * from loses"]) == 1
    assert "losses" in capsys.readouterr().err
    assert main(["sql", "runs/x", "create table t (x int)"]) == 1
    assert main(["sql", "runs/x", "select cast(source as int) from samples"]) == 1
    assert main(["sql", "nowhere", "select 1"]) == 1
    assert "error: nowhere: not a run folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("output", "status", "error"),
    [
        (">/dev/full", 1, "error: the disk: No space left on device; free some space"),
        ("| true", 0, ""),
        (">&-", 0, ""),
    ],
)
def test_output_that_nobody_can_read_is_named_or_ignored(output: str, status: int, error: str, config: Path) -> None:
    assert main(["prepare", str(config)]) == 0
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = f"set -o pipefail; {sys.executable} -m flows.cli.main status runs/x {output}"
    environment["PYTHONPATH"] = str(Path(__file__).parents[3])
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == status
    assert done.stderr.startswith(error) and done.stderr.count("\n") == bool(error)


def test_a_moved_run_folder_is_still_a_run(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", str(config)]) == 0
    (config.parent / "runs").rename(config.parent / "elsewhere")
    assert main(["sql", "elsewhere/x", "select count(*) from samples"]) == 0
    assert main(["prepare", "elsewhere/x"]) == 0
    (config.parent / "elsewhere" / "x").rename(config.parent / "elsewhere" / "y")
    assert main(["prepare", "elsewhere/y"]) == 0
    assert not (config.parent / "runs").exists()


def test_doctor_names_what_is_missing(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(config)]) == 0
    assert "missing" not in capsys.readouterr().out
    assert main(["doctor", str(config), "--set", "name=other", "--set", "corpus.sources.0.path=nothing.jsonl"]) == 1
    assert "nothing.jsonl" in capsys.readouterr().out
    text = config.read_text()
    config.write_text(text + "device: npu\nmodel: {layers: transformer_engine, num_layers: 1000, hidden_size: 65536}\n")
    (config.parent / "a.jsonl").unlink()
    assert main(["doctor", str(config)]) == 1
    out, err = capsys.readouterr()
    missing = [line for line in out.splitlines() if line.startswith("missing")]
    assert [words in line for words, line in zip(
        ("torch-npu is not installed", "install transformer_engine[pytorch]", "a.jsonl",
         "memory of a host: ", "disk: "),
        missing, strict=True,
    )] == [True] * 5  # fmt: skip
    assert "5 requirements missing on this machine" in err


def test_a_dry_run_of_the_launch_starts_nothing(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(config), "--dry-run"]) == 0
    assert "-m trainer.agent --nnodes 1 --nproc-per-node 1" in capsys.readouterr().out
    slurm = ["--set", "device=cuda", "--set", "launch={kind: slurm, slurm: {partition: gpu}}"]
    assert main(["run", str(config), "--dry-run", *slurm]) == 0
    assert "#SBATCH --partition=gpu" in capsys.readouterr().out
    assert not (config.parent / "runs").exists()


def test_slurm_that_is_not_there_is_named(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["prepare", str(config), "--set", "device=cpu", "--set", "launch.kind=slurm"]) == 1
    assert "launch.kind: slurm needs sbatch, squeue, scontrol, scancel; start this on a" in one_line(capsys)


def test_serving_needs_its_folder_and_a_free_port(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve"]) == 1
    assert "has no prefect.yaml; run this command in a folder made by `reprise init FOLDER`" in one_line(capsys)
    (config.parent / "prefect.yaml").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 1
    assert f"--port: 127.0.0.1:{port} cannot be used (Address already in use); stop what uses it" in one_line(capsys)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], check=False, stderr=-3)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_named_and_leaves_nothing_half_written(
    config: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = [json.dumps({"text": document}) for document in make_documents(2000)]
    (config.parent / "a.jsonl").write_text("\n".join(large))
    assert main(["prepare", str(config), "--set", f"output={small_disk}"]) == 1
    assert "No space left on device; free some space and run the same command again" in one_line(capsys)
    corpus = small_disk / "x" / "corpus"
    assert not (corpus / "manifest.json").exists()
    assert not list(corpus.glob("*.bin"))
    assert not list(corpus.rglob(".*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert main(["prepare", str(config), "--set", f"output={small_disk}"]) == 0


def test_fingerprints_follow_the_inputs(config: Path) -> None:
    def run(*overrides: str) -> Run:
        return open_run(read_config(config, ["name=y", *overrides]))

    assert main(["prepare", str(config), "--set", "name=y"]) == 0
    base = run()
    other = base.__class__(
        base.config.model_copy(update={"refine": base.config.refine.model_copy(update={"sampling_rate": 0.3})}),
        base.folder,
    )
    assert fingerprint_of(base, "score", 1) == fingerprint_of(other, "score", 1)
    assert fingerprint_of(base, "refine", 2) != fingerprint_of(other, "refine", 2)
    assert fingerprint_of(base, "train", 2) != fingerprint_of(other, "train", 2)
    # Were a round to ask twice for the one before, this would take 2^60 steps.
    assert fingerprint_of(base, "train", 60) != fingerprint_of(base, "train", 59)
    assert fingerprint_of(base, "train", 1) == fingerprint_of(run("device=cpu", "train.micro_batch_size=1"), "train", 1)


def test_a_second_process_is_kept_off_the_run(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", str(config)]) == 0
    with locked(config.parent / "runs" / "x"):
        assert main(["prepare", str(config)]) == 1
    assert f"in use by process {os.getpid()}" in one_line(capsys)


def test_the_lock_of_a_dead_process_is_no_lock(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with locked(tmp_path):
            os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    with locked(tmp_path):
        pass
