"""The study's rule on made-up results, and the study's page, which shows what was recorded."""

from pathlib import Path

import pytest

from benchmarks.study.plots import draw
from benchmarks.study.regimes import REGIMES
from benchmarks.study.results import BASE, PARTS, RECORDED, differences, repeated, tables, write_results
from tests import ROOT


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Results of one regime: a random draw at 4.0, and arms with known differences to it in each of three seeds."""
    shifts = {
        "random": (0.0, 0.0, 0.0),
        "all": (0.01, -0.01, 0.01),
        "lower": (-0.05, -0.06, -0.04),
        "higher": (0.5, 0.4, 0.6),
        "within noise": (-0.015, -0.016, -0.014),
        "of two minds": (-0.5, -0.5, 0.1),
        "uncertain": (0.9, 0.02, 0.03),
    }
    rows = [
        ("noise", seed, arm, "all tokens", 4 + 0.1 * seed + shift)
        for arm, each in shifts.items()
        for seed, shift in enumerate(each)
    ]
    for seed in range(3):
        rows.append(("noise", seed, BASE, "share forgotten", 0.2))
        for part in range(1, PARTS + 1):
            rows += [("noise", seed, BASE, f"{name} forgotten, part {part}", part / 10) for name in ("share", "nats")]
    write_results(rows, tmp_path / "results.csv")
    return tmp_path / "results.csv"


def test_an_arm_is_better_if_seeds_agree_and_noise_is_exceeded(made: Path) -> None:
    found = {row[2]: row for row in differences(made)}
    assert {arm: row[8] for arm, row in found.items()} == {
        "all": "", "lower": "better", "higher": "worse", "within noise": "", "of two minds": "", "uncertain": "",
    }  # fmt: skip
    _, _, _, mean, error, lower, seeds, noise, _ = found["lower"]
    assert (mean, error, lower, seeds) == pytest.approx((-0.05, 0.01 / 3**0.5, 3, 3))
    assert noise == pytest.approx(0.01)


def test_tables_show_every_arm_and_part(made: Path) -> None:
    lines = tables(made).splitlines()
    assert "| lower | -0.0500 ± 0.0058 (3/3) better |" in lines
    assert "| noise between equals | 0.0100 |" in lines
    assert "| share forgotten | 0.200 (0.200 to 0.200) |" in lines
    assert "| share forgotten, by part | 0.10, 0.20, 0.30, 0.40, 0.50, 0.60, 0.70, 0.80 |" in lines


def test_a_repeated_cell_is_compared_with_the_recorded_one(made: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.csv"
    again.write_text(made.read_text().replace("noise,0,lower,all tokens,3.95", "noise,0,lower,all tokens,3.9525"))
    assert "| noise | all tokens | 21 | 0.002500 | 0.0100 |" in repeated(again, made)


def test_the_page_shows_what_was_recorded(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "study.md").read_text()
    for line in tables(RECORDED).splitlines():
        assert line in page
    assert {row[0] for row in differences(RECORDED)} == set(REGIMES)
    assert {row[6] for row in differences(RECORDED)} == {3}
    draw(RECORDED, tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 10_000
