"""The report and the ledger are written beside a run that goes on, and read where nothing can be written."""

import re
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest

from flows.cli.main import main
from flows.report.run_report import rounds_table
from flows.run.folder import read_run
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
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png;base64,") >= 2
    assert files() == before


def test_counts_agree_with_their_nouns(run_folder: Path) -> None:
    assert main(["report", str(run_folder)]) == 0
    page = (run_folder / "report.html").read_text()
    config = read_run(run_folder).config
    for number, noun in ((len(config.corpus.sources), "source"), (config.corpus.num_shards, "shard")):
        assert re.search(rf" {number} {noun}{'s' * (number != 1)}\b", page)


def test_times_of_rounds_are_whole_seconds() -> None:
    ledger = duckdb.connect()
    ledger.execute("""create table rounds as select 1 as round, 10 as num_steps, 78 as num_samples, 19968 as num_tokens,
        6.5 as train_loss, 6.25 as validation_loss, 1030.6 as training_seconds, null::double as scoring_seconds,
        34420 as scoring_cost""")
    cells = re.findall(r"<td[^>]*>([^<]*)", rounds_table(ledger))
    assert cells[-3:] == ["1,031", "", "34,420"]
