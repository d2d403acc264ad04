"""The verdict gives what the study found, in every one of its runs, and says so in the report and in the terminal."""

from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pytest

from benchmarks.study.results import BASE, RECORDED
from flows.cli.main import main
from flows.report.round_facts import Cost, Forgotten, RoundFacts
from flows.report.run_report import write_report
from flows.report.verdict import FAR_FROM_RANDOM, FORGOTTEN, NOTHING_FORGOTTEN, Kind, judge, kind_of
from flows.run.config import parse_config
from flows.run.folder import read_run
from tests.conftest import MakeOnce
from tests.flows.report.test_round_facts import Draw, with_losses
from tests.flows.stages.test_verification import make_runs

Cells = dict[tuple[str, int], dict[tuple[str, str], float]]
CONFIG = {"name": "x", "corpus": {"sources": [{"name": "a", "path": "a.jsonl"}]}}
COST = Cost(1000, 500, 333, None)


@pytest.fixture(scope="module")
def cells() -> Cells:
    """What the study recorded, by regime and seed, then by arm and measure."""
    found: Cells = {}
    with duckdb.connect() as connection:
        rows = connection.execute("from read_csv(?)", [str(RECORDED)]).fetchall()
    for regime, seed, arm, measure, value in rows:
        found.setdefault((regime, seed), {})[arm, measure] = value
    return found


def facts_of(cell: dict[tuple[str, str], float]) -> RoundFacts:
    forgotten = Forgotten(1, cell[BASE, "share forgotten"], cell[BASE, "nats forgotten"])
    spread, distance = cell[BASE, "spread of losses in shards"], cell[BASE, "distance of the draw"]
    return RoundFacts(1, 2, cell[BASE, "tokens per parameter"], forgotten, (), spread, distance, COST, None)


@pytest.mark.parametrize(
    ("kind", "regimes"),
    [
        (NOTHING_FORGOTTEN, {"one_pass"}),
        (FORGOTTEN, {"saturated", "noise", "rare"}),
        (FAR_FROM_RANDOM, {"sequence"}),
    ],
)
def test_findings_are_those_of_the_study(kind: Kind, regimes: set[str], cells: Cells) -> None:
    mine = [cell for cell in cells.values() if kind_of(facts_of(cell)) is kind]
    assert {regime for (regime, _), cell in cells.items() if kind_of(facts_of(cell)) is kind} == regimes

    def less(arm: str, measure: str) -> list[float]:
        return [cell["loss", measure] - cell[arm, measure] for cell in mine]

    mean, worst = less("random", "all tokens"), less("random", "worst source")
    found = kind.finding
    assert found.num_runs == len(mine) == 3 * len(regimes)
    assert found.mean == pytest.approx(np.mean(mean), abs=1e-3)
    assert found.mean_paid == pytest.approx(np.mean(less("random_paid", "all tokens")), abs=1e-3)
    assert found.worst == pytest.approx(np.mean(worst), abs=1e-3)
    assert (found.mean_lower, found.worst_lower) == (sum(x < 0 for x in mean), sum(x < 0 for x in worst))


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (lambda chance, size: chance.uniform(1, 1.9, size), NOTHING_FORGOTTEN),
        (lambda chance, size: chance.uniform(1.5, 2.6, size), FORGOTTEN),
        (lambda chance, size: chance.choice([1.5, 9.5], size), FAR_FROM_RANDOM),
    ],
)
def test_a_run_is_told_by_its_losses(
    end: Draw, expected: Kind, make_once: MakeOnce, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, *_ = with_losses(
        make_once("verified", make_runs) / "train 2", tmp_path / "run", end, lambda chance, n: chance.uniform(2, 3, n)
    )
    assert main(["advise", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0], lines[-1]) == (expected.headline, expected.advice)
    assert [line.split()[1] for line in lines[1:-1]] == ["Forgotten:", "Spread:", "Cost:", "Result:", "Study"]
    page = write_report(read_run(folder)).read_text()
    assert page.index(expected.headline) < page.index('class="lead"')


def test_without_losses_of_whole_samples_there_is_no_verdict(
    make_once: MakeOnce, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = make_once("verified", make_runs)
    assert main(["advise", str(runs / "prepare")]) == 0
    assert capsys.readouterr().out.startswith("No verdict: no round has been scored.\n")
    assert main(["advise", str(runs / "train 2")]) == 0
    assert capsys.readouterr().out.startswith("No verdict: what the model has forgotten is not known.\n")


def test_a_budget_that_scores_parts_of_samples_tells_nothing(cells: Cells) -> None:
    facts = replace(facts_of(cells["saturated", 0]), forgotten=None)
    assert kind_of(facts) is None


@pytest.mark.parametrize(
    ("seconds_a_token", "text"),
    [(None, "0.00 M tokens and"), (0.0604, "(30 s)"), (0.238, "(119 s)"), (0.3, "(2.5 min)"), (20.16, "(2.8 h)")],
)
def test_a_round_costs_tokens_and_time(seconds_a_token: float | None, text: str, cells: Cells) -> None:
    facts = replace(facts_of(cells["saturated", 0]), cost=replace(COST, seconds_a_token=seconds_a_token))
    reasons = judge(facts, parse_config(CONFIG, "test")).reasons
    assert f"trains on 0.00 M tokens {text}" in reasons[2] if seconds_a_token else text in reasons[2]
