"""What commands import: those that only look, and errors of a configuration, wait for no large package."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.run.config import parse_config
from flows.run.folder import open_run
from tests.flows.fakes import values, write_texts

ROOT = Path(__file__).parents[3]
HEAVY = {"torch", "megatron", "prefect", "matplotlib", "datasets", "transformers", "lm_eval", "pandas", "scipy"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that has begun."""
    folder = tmp_path_factory.mktemp("imports")
    (folder / "texts").mkdir()
    write_texts(folder / "texts")
    open_run(parse_config({**values(folder / "texts", folder / "runs"), "name": "begun"}, "test"))
    return folder


def run(folder: Path, *arguments: str) -> tuple["subprocess.CompletedProcess[str]", set[str]]:
    """Run a command in `folder`; return how it ended, and the packages of `HEAVY` that it imported."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "flows.cli.main", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}
    assert "pydantic" in imported
    done.stderr = "\n".join(line for line in done.stderr.splitlines() if line not in lines)
    return done, imported & HEAVY


@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        (["--help"], "Train tiny language models"),
        (["run", "--help"], "CONFIG_OR_RUN"),
        (["status", "runs/begun"], "prepare"),
        (["--version"], "megatron-core"),
        (["status", "runs/begun", "--json"], '"stage": "prepare"'),
        (["runs"], "begun"),
        (["watch", "runs/begun"], "prepare: stopped"),
        (["sql", "runs/begun", "select 41 + 1 as answer"], "42"),
        (["model"], "pangu"),
        (["join", "--help"], "RUN"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_looking_imports_no_large_package(folder: Path, arguments: list[str], output: str) -> None:
    done, heavy = run(folder, *arguments)
    assert (done.returncode, heavy) == (0, set()), done.stderr
    assert output in done.stdout


CORPUS = "corpus: {sources: [{name: one, path: texts/a.jsonl}]}\n"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("name: [x", "not valid YAML"),
        (f"name: x\n{CORPUS}nmae: y\n", "nmae"),
        ("name: x\n", "corpus: field required"),
        (f"name: x\n{CORPUS}parallel: {{pipeline: 3}}\n", "pipeline"),
        (f"name: x\n{CORPUS}parallel: {{tensor: 3}}\n", "tensor"),
        ("name: x\ncorpus: {sources: [{name: one, path: missing.jsonl}]}\n", "no file matches 'missing.jsonl'"),
        (f"name: x\n{CORPUS}tokenizer: {{path: missing.json}}\n", "missing.json"),
        (None, "no such file"),
    ],
    ids=["yaml", "unknown field", "missing field", "layers", "heads", "source", "tokenizer", "configuration"],
)
def test_errors_of_a_configuration_come_before_large_packages(folder: Path, text: str | None, error: str) -> None:
    path = folder / "config.yaml"
    path.unlink(missing_ok=True)
    if text is not None:
        path.write_text(text)
    done, heavy = run(folder, "run", "config.yaml")
    assert (done.returncode, heavy) == (1, set())
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert error in line
    assert not (folder / "runs" / "x").exists()


TRIALS = {
    "compare": ["--policies", "loss"],
    "sweep": ["--parameters", "1e6"],
    "grid": ["--batch-tokens", "4096"],
    "inherit compare": ["--methods", "base"],
}


@pytest.mark.parametrize("command", TRIALS)
@pytest.mark.parametrize(
    ("text", "error"),
    [
        (f"name: x\n{CORPUS}nmae: y\n", "nmae"),
        ("name: x\ncorpus: {sources: [{name: one, path: missing.jsonl}]}\n", "no file matches 'missing.jsonl'"),
        (f"name: x\n{CORPUS}tokenizer: {{path: missing.json}}\n", "missing.json"),
    ],
    ids=["unknown field", "source", "tokenizer"],
)
def test_errors_of_trials_come_before_large_packages(folder: Path, command: str, text: str, error: str) -> None:
    (folder / "config.yaml").write_text(text)
    done, heavy = run(folder, *command.split(), "config.yaml", *TRIALS[command])
    assert (done.returncode, heavy) == (1, set())
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert error in line
    assert not list((folder / "runs").glob("x*"))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "has no prefect.yaml; run this command in a folder made by `reprise init FOLDER`"),
        (["--port", "70000"], "--port: 70000 is not between 1 and 65534"),
        (["--port", "-1"], "--port: -1 is not between 1 and 65534"),
    ],
)
def test_serve_tells_at_once_that_it_cannot_start(
    folder: Path, tmp_path: Path, arguments: list[str], error: str
) -> None:
    if arguments:
        (tmp_path / "prefect.yaml").touch()
    done, heavy = run(tmp_path, "serve", *arguments)
    assert (done.returncode, heavy) == (1, set())
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert error in line


@pytest.mark.parametrize("module", ["flows.orchestration.here", "flows.orchestration.temporary_server"])
def test_what_starts_prefect_does_not_wait_for_its_import(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert HEAVY.isdisjoint(done.stdout.split())
