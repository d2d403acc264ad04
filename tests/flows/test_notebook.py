"""docs/notebook.ipynb: its code runs, in order; what it shows comes from a run, and names no machine."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

from data_scoring.ledger import open_ledger
from tests import ROOT
from tests.conftest import MakeOnce
from tests.flows.stages.test_verification import STOPS, make_runs
from tests.flows.test_api import write_config

NOTEBOOK = ROOT / "docs" / "notebook.ipynb"
_MOST_BYTES = 300_000


def code_cells() -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def execute(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Execute cells in order and return the variables that they leave."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells:
        exec(compile("".join(cell["source"]), NOTEBOOK.name, "exec"), names)
    return names


@pytest.fixture
def run(make_once: MakeOnce, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run where the notebook, in its folder, looks for it."""
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path / "docs")
    monkeypatch.setattr(plt, "show", lambda: None)
    return Path(shutil.copytree(make_once("verified", make_runs) / STOPS[-1], tmp_path / "runs" / "demo"))


def is_looking(cell: dict[str, Any]) -> bool:
    return "starts-a-run" not in cell["metadata"].get("tags", [])


def test_what_looks_at_a_run_shows_its_figures(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = execute([cell for cell in code_cells() if is_looking(cell)])
    with open_ledger(run) as ledger:
        [(count, mean)] = ledger.sql("select count(*), avg(loss) from losses").fetchall()
        shards = ledger.sql("select distinct round, shard from losses").fetchall()
        [hardest, *_] = ledger.sql("select loss from losses where round = 1 order by loss desc").fetchall()
    assert (len(names["losses"]), names["losses"]["loss"].mean()) == (count, pytest.approx(mean))
    assert len(names["left"].lines) == 2 and len(names["right"].patches) == len(shards)
    assert f"loss {hardest[0]:.2f}" in capsys.readouterr().out
    plt.close(names["figure"])


@pytest.mark.slow
def test_what_starts_a_run_trains_it(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "configs").mkdir()
    write_config(tmp_path).rename(tmp_path / "configs" / "demo.yaml")
    names = execute(code_cells())
    assert names["other"].folder.resolve() == tmp_path.resolve() / "runs" / "demo-random"
    with open_ledger(names["other"].folder) as ledger:
        [(loss,)] = ledger.sql("select validation_loss from rounds where round = 2").fetchall()
        assert ("drawn at random",) in ledger.sql("select distinct reason from selection").fetchall()
    assert f"random  round 2: validation loss {loss:.3f} nats per token" in capsys.readouterr().out
    plt.close(names["figure"])


def test_its_outputs_are_of_one_execution_in_order() -> None:
    cells = code_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert all(output.get("name") != "stderr" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert all(cell["outputs"] for cell in cells)


def test_it_is_small_and_names_no_machine() -> None:
    text = NOTEBOOK.read_text()
    assert len(text) < _MOST_BYTES
    without_pictures = re.sub(r'"image/png": ".*?"', "", text)
    assert re.findall(r"(?:/(?:tmp|home|root|work|Users|usr|opt)/|[A-Z]:\\\\)\S*", without_pictures) == []
