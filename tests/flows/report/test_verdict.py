"""The verdict gives what the study found, in every one of its runs, and says so in the report and in the terminal."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
import yaml

from benchmarks.study.results import BASE, DISTANCE, RECORDED
from data_scoring.refine.refine_config import RefineConfig
from flows.cli.main import main
from flows.report.round_facts import Cost, Forgotten, RoundFacts
from flows.report.run_report import write_report
from flows.report.verdict import FORGOTTEN, IN_PARTS, LEFT_OUT, NOTHING_FORGOTTEN, Finding, Kind, judge, kind_of
from flows.run.config import parse_config
from flows.run.folder import read_run
from tests.conftest import MakeOnce
from tests.flows.report.test_round_facts import Draw, with_losses
from tests.flows.stages.test_verification import make_runs

Cells = dict[tuple[str, int], dict[tuple[str, str], float]]
CONFIG = {"name": "x", "corpus": {"sources": [{"name": "a", "path": "a.jsonl"}]}}
NO_VERDICT = "No verdict: the study's is about drawing by loss, and this run has policy"
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


def facts_of(cell: dict[tuple[str, str], float], arm: str = BASE) -> RoundFacts:
    forgotten = Forgotten(1, cell[BASE, "share forgotten"], cell[BASE, "nats forgotten"])
    spread, distance = cell[BASE, "spread of losses in shards"], cell[arm, DISTANCE]
    return RoundFacts(1, 2, cell[BASE, "tokens per parameter"], forgotten, (), spread, distance, COST, None)


def check_finding(found: Finding, arm: str, cells: list[dict[tuple[str, str], float]]) -> None:
    def less(other: str, measure: str) -> list[float]:
        return [cell[arm, measure] - cell[other, measure] for cell in cells]

    mean, worst = less("random", "all tokens"), less("random", "worst source")
    assert found.num_runs == len(cells)
    assert found.mean == pytest.approx(np.mean(mean), abs=1e-4)
    assert found.mean_paid == pytest.approx(np.mean(less("random_paid", "all tokens")), abs=1e-4)
    assert found.worst == pytest.approx(np.mean(worst), abs=1e-4)
    assert (found.mean_lower, found.worst_lower) == (sum(x < 0 for x in mean), sum(x < 0 for x in worst))


@pytest.mark.parametrize(
    ("kind", "regimes"),
    [
        (NOTHING_FORGOTTEN, {"one_pass"}),
        (FORGOTTEN, {"saturated", "noise", "rare"}),
        (LEFT_OUT, {"sequence"}),
    ],
)
def test_findings_are_those_of_the_study(kind: Kind, regimes: set[str], cells: Cells) -> None:
    mine = {place: cell for place, cell in cells.items() if kind_of(facts_of(cell), "shard") is kind}
    assert set(mine) == {(regime, seed) for regime in regimes for seed in range(3)}
    check_finding(kind.finding, "loss", list(mine.values()))


def test_a_draw_within_parts_is_of_the_kind_that_the_study_measured(cells: Cells) -> None:
    for (regime, _), cell in cells.items():
        kind = kind_of(facts_of(cell, "loss_part"), "part")
        assert kind is (IN_PARTS if regime == "sequence" else kind_of(facts_of(cell), "shard"))
    check_finding(IN_PARTS.finding, "loss_part", [cells["sequence", seed] for seed in range(3)])


@pytest.mark.parametrize(
    ("share", "nats", "distance", "within", "kind"),
    [
        (0.005, -0.3, 0.1, "shard", NOTHING_FORGOTTEN),
        (0.05, -0.3, 0.1, "shard", None),
        (0.2, -0.3, 0.1, "shard", FORGOTTEN),
        (0.2, -0.3, 0.25, "shard", None),
        (0.2, -0.3, 0.45, "shard", LEFT_OUT),
        (0.9, 2.0, 0.45, "part", LEFT_OUT),
        (0.9, 2.0, 0.2, "part", IN_PARTS),
        (0.9, 2.0, 0.2, "shard", None),
    ],
)
def test_what_was_not_measured_is_of_no_kind(
    share: float, nats: float, distance: float, within: str, kind: Kind | None, cells: Cells
) -> None:
    facts = replace(facts_of(cells["rare", 0]), forgotten=Forgotten(1, share, nats), distance=distance)
    assert kind_of(facts, within) is kind


@pytest.mark.parametrize(
    ("refine", "headline"),
    [
        ({"policy": "top"}, f"{NO_VERDICT} top at sampling rate 0.5."),
        ({"sampling_rate": 1.0}, f"{NO_VERDICT} loss at sampling rate 1."),
        ({"sources": [{"name": "a", "at_least": 0.5}]}, f"{NO_VERDICT} loss with limits of sources."),
        ({}, FORGOTTEN.headline),
    ],
)
def test_other_draws_have_no_verdict(refine: dict[str, Any], headline: str, cells: Cells) -> None:
    verdict = judge(facts_of(cells["rare", 0]), parse_config({**CONFIG, "refine": refine}, "test"))
    assert verdict.headline == headline
    assert len(verdict.reasons) == (3 if refine else 4)


def test_a_policy_without_losses_has_no_verdict() -> None:
    verdict = judge(None, parse_config({**CONFIG, "refine": {"policy": "random", "outlier_z": None}}, "test"))
    assert verdict.headline == "Policy random needs no losses, so no round was scored."


def test_advice_names_a_random_draw_of_the_same_cost(cells: Cells) -> None:
    verdict = judge(facts_of(cells["rare", 0]), parse_config(CONFIG, "test"))
    # 500 tokens trained on and scoring worth 333, of 1,000.
    assert "refine: {policy: random, sampling_rate: 0.83, outlier_z: null}" in verdict.advice
    RefineConfig(**yaml.safe_load("{policy: random, sampling_rate: 0.83, outlier_z: null}"))
    later = judge(replace(facts_of(cells["rare", 0]), round_number=2, gain=0.02), parse_config(CONFIG, "test"))
    assert later.reasons[0].startswith("Result: round 3 raised the validation loss by 0.020 nats per token.")
    assert later.reasons[-1].endswith("It drew after round 1, at sampling rate 0.5.")


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (lambda chance, size: chance.uniform(1, 1.9, size), NOTHING_FORGOTTEN),
        (lambda chance, size: chance.uniform(1.5, 2.6, size), FORGOTTEN),
        (lambda chance, size: chance.choice([1.5, 9.5], size), LEFT_OUT),
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
    assert lines[0] == expected.headline
    assert lines[-1].startswith(expected.advice.partition("{{")[0].partition("{rate")[0][:30])
    assert [line.split()[1] for line in lines[1:-1]] == ["Result:", "Forgotten:", "Spread:", "Cost:", "Study"]
    page = write_report(read_run(folder)).read_text()
    assert page.index(expected.headline) < page.index('class="lead"')


def test_without_losses_of_whole_samples_there_is_no_verdict(
    make_once: MakeOnce, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = make_once("verified", make_runs)
    assert main(["advise", str(runs / "prepare")]) == 0
    assert capsys.readouterr().out.startswith("No verdict yet: no round has been scored.\n")
    assert main(["advise", str(runs / "train 2")]) == 0
    assert capsys.readouterr().out.startswith("No verdict: what the model has forgotten is not known.\n")


def test_a_budget_that_scores_parts_of_samples_tells_nothing(cells: Cells) -> None:
    facts = replace(facts_of(cells["saturated", 0]), forgotten=None)
    assert kind_of(facts, "shard") is None


@pytest.mark.parametrize(
    ("seconds_a_token", "text"),
    [(None, ""), (0.0604, " (30 s)"), (0.238, " (119 s)"), (0.3, " (2.5 min)"), (20.16, " (2.8 h)")],
)
def test_a_round_costs_tokens_and_time(seconds_a_token: float | None, text: str, cells: Cells) -> None:
    facts = replace(facts_of(cells["saturated", 0]), cost=replace(COST, seconds_a_token=seconds_a_token))
    reasons = judge(facts, parse_config(CONFIG, "test")).reasons
    assert reasons[2].startswith(f"Cost: another round trains on 0.00 M tokens{text}, and scoring")
