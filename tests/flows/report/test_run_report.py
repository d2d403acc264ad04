"""The report and the ledger are written beside a run that goes on, and read where nothing can be written."""

import subprocess
import sys
from pathlib import Path

import pytest

from flows.cli.main import main
from flows.run.locks import locked
from tests import ROOT
from tests.conftest import MakeOnce
from tests.flows.stages.test_verification import STOPS, make_runs

# Ends in the middle of writing a file of the report, or of the ledger, without cleaning up.
KILLED = """
import os, sys
from pathlib import Path
from data_scoring.base import files
from flows.run.folder import read_run
from flows.report.run_report import write_report
name, run = sys.argv[1], read_run(Path(sys.argv[2]))
def end(temporary, path):
    if path.name == name:
        os._exit(9)
    commit(temporary, path)
commit, files.commit = files.commit, end
write_report(run)
"""


@pytest.fixture
def run_folder(make_once: MakeOnce, tmp_path: Path) -> Path:
    runs = make_once("verified", make_runs)
    subprocess.run(["cp", "-r", str(runs / STOPS[-1]), str(tmp_path / "x")], check=True)
    return tmp_path / "x"


@pytest.mark.parametrize(
    ("name", "is_run"), [("report.html", False), ("loss.png", True), ("ledger.duckdb", False), ("ledger.duckdb", True)]
)
def test_what_a_killed_report_leaves_is_gone_after_the_next_or_a_run(run_folder: Path, name: str, is_run: bool) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, name, str(run_folder)], cwd=ROOT, check=False)
    assert killed.returncode == 9
    assert [path for path in run_folder.rglob(".*.tmp") if name in path.name] != []
    if is_run:
        with locked(run_folder):
            pass
    else:
        assert main(["report", str(run_folder)]) == 0
    assert list(run_folder.rglob(".*.tmp*")) == []


def test_a_run_that_cannot_be_written_to_is_reported_elsewhere(run_folder: Path, tmp_path: Path) -> None:
    def files() -> dict[Path, int]:
        known = (path for path in run_folder.rglob("*") if path.is_file() and path.name != ".verified.json")
        return {path: path.stat().st_mtime_ns for path in known}

    before = files()
    assert main(["report", str(run_folder), "--output", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text().count("data:image/png;base64,") >= 2
    assert files() == before
