"""A comparison's arms, its arithmetic and resuming it, with fake ranks; and a real comparison."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from data_scoring.base.parquet import write_parquet
from data_scoring.base.progress import silent
from data_scoring.refine.refine_config import RefineConfig
from data_scoring.refine.training_mix import Mix
from flows.cli.main import main
from flows.display.result_page import span
from flows.experiments.arms import (
    arm_comparison,
    init_comparison,
    policy_comparison,
    rate_comparison,
    round_comparison,
)
from flows.experiments.compare import compare
from flows.experiments.compare_report import write_comparison
from flows.experiments.compare_results import BASE, RESULTS, open_results
from flows.experiments.equal_arms import needs_losses
from flows.run.config import RunConfig
from flows.run.folder import read_run
from flows.run.sharing import share
from flows.stages.status import read_status
from tests.conftest import read_rows
from tests.flows.fakes import BATCH, LOSSES, FakeRanks, values


def corpus_tokens(run: Path) -> int:
    return sum(row[0] for row in read_rows(run / "corpus" / "samples.parquet", "num_tokens"))


def test_means_and_paired_differences_are_those_computed_by_hand(config: RunConfig, tmp_path: Path) -> None:
    rows = [
        {"seed": seed, "arm": arm.replace("base", BASE), "source": source, "loss": loss, "num_tokens": num_tokens,
         "num_steps": 7 + seed,
         "trained_tokens": 100 + seed, "scoring_cost": 30 if arm == "loss" else 0, "round_1_tokens": 200}
        for arm, seeds in LOSSES.items() for seed, losses in seeds.items()
        for source, loss, num_tokens in zip("ab", losses, (300, 100), strict=True)
    ]  # fmt: skip
    path, arms = tmp_path / "compare.parquet", ["loss", "random", "all"]
    write_parquet(path, pa.Table.from_pylist(rows, RESULTS), "")
    with open_results(path, arms) as results:
        spread = {row[:2]: row[2:] for row in results.sql(
            "select arm, source, mean, deviation, least, most from spread").fetchall()}  # fmt: skip
        differences = {row[:2]: row[2:] for row in results.sql(
            "select arm, source, mean, error, num_lower, num_seeds from differences").fetchall()}  # fmt: skip
        costs = results.sql("select cost from costs where arm = 'loss' order by seed").fetchall()
    # a: 4.0, 4.2, 4.1; all tokens, (300 a + 100 b) / 400: 3.5, 3.75, 3.775.
    assert spread["loss", "a"] == pytest.approx((4.1, 0.1, 4.0, 4.2))
    assert spread["loss", "all tokens"] == pytest.approx((11.025 / 3, 0.152069, 3.5, 3.775), abs=1e-6)
    assert spread[BASE, "mean of sources"] == pytest.approx((24.9 / 6, 0.15, 4.0, 4.3))
    # Less those of random: a: -0.1, -0.2, -0.1; b: 0.1, 0.2, 0.0; all tokens: -0.05, -0.1, -0.075.
    assert differences["loss", "a"] == pytest.approx((-0.4 / 3, 0.1 / 3, 3, 3))
    assert differences["loss", "b"] == pytest.approx((0.1, 0.1 / np.sqrt(3), 0, 3), abs=1e-9)
    assert differences["loss", "all tokens"] == pytest.approx((-0.075, 0.025 / np.sqrt(3), 3, 3))
    assert {arm for arm, _ in differences} == {"loss", "all"}
    assert costs == [(130,), (131,), (132,)]
    comparison = write_comparison(path, policy_comparison(",".join(arms)), config, 102)
    page, text = comparison.page.read_text(), comparison.text
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page
    for words in (
        "-0.0750 ± 0.0144, 3 of 3",
        "at most 102 predicted tokens",
        "the difference between these two arms is noise",
    ):
        assert words in page and words in text
    # Cost: 131 on average, of round 1's 200.
    assert "| loss | 7 to 9 | 100 to 102 | 30 | 131 | 65.5% |" in " ".join(text.split())
    assert text in (tmp_path / "compare.md").read_text()


def test_policies_train_on_equal_tokens_from_the_same_round(config: RunConfig, fakes: FakeRanks) -> None:
    comparison = compare(config, policy_comparison("loss,random"), 2, None, silent)
    folder = comparison.page.parent
    assert folder == Path(config.output) / "x-compare"
    corpora = [corpus_tokens(folder / f"base-seed-{seed}") for seed in range(2)]
    budget = read_run(folder / "loss-seed-0").config.refine.max_tokens
    assert budget is not None and 0.45 * min(corpora) < budget <= 0.5 * min(corpora)
    with open_results(folder / "compare.parquet", ["loss", "random"]) as results:
        for seed, arm, steps, trained, scored, _, cost in results.sql("from costs order by seed, arm").fetchall():
            mix = Mix(folder / f"{arm}-seed-{seed}" / "rounds" / "2" / "mix.parquet")
            assert (steps, trained) == (-(-len(mix) // BATCH), pytest.approx(budget, abs=16))
            assert trained <= budget
            assert scored == (round(corpora[seed] / 3) if arm == "loss" else 0)
            assert cost == trained + scored
        measured = dict(results.sql("select arm, loss from losses where source = 'a' and seed = 1").fetchall())
    assert measured == pytest.approx({BASE: 5.2, "loss": 4.2, "random": 4.4})
    assert [row.state for row in read_status(folder / "loss-seed-1")] == ["done"] * 7


def test_arms_of_a_file_have_equal_cost(config: RunConfig, fakes: FakeRanks, tmp_path: Path) -> None:
    path = tmp_path / "arms.yaml"
    path.write_text(
        "loss: {policy: loss}\nsharp: {policy: loss, temperature: 0.5}\nrandom: {policy: random}\nall: {policy: all}\n"
    )
    comparison = replace(arm_comparison(path, config.refine), equal="cost")
    page = compare(config, comparison, 2, None, silent)
    corpora = [corpus_tokens(page.page.parent / f"base-seed-{seed}") for seed in range(2)]
    with open_results(page.page.parent / "compare-arms.parquet", ["loss", "sharp", "random", "all"]) as results:
        costs = results.sql("select seed, arm, trained_tokens, scoring_cost, cost from costs").fetchall()
    assert len(costs) == 8
    # Half of the smaller corpus, and a forward pass over it.
    common = min(corpora) * (1 / 2 + 1 / 3)
    for seed, arm, trained, scored, cost in costs:
        assert scored == (0 if arm in ("random", "all") else round(corpora[seed] / 3))
        assert cost == trained + scored == pytest.approx(common, abs=48)
    assert read_run(page.page.parent / "sharp-seed-1").config.refine.temperature == 0.5
    assert read_run(page.page.parent / "random-seed-1").config.refine.sampling_rate == pytest.approx(0.85, abs=0.001)
    # A random draw is not everything, cut at the same place: their difference would say nothing about noise.
    mixes = [Mix(page.page.parent / f"{arm}-seed-0" / "rounds" / "2" / "mix.parquet") for arm in ("random", "all")]
    drawn = [set(zip(*mix.read(0, len(mix)), strict=True)) for mix in mixes]
    assert drawn[0] - drawn[1] and drawn[1] - drawn[0]
    for words in (
        "Arms differ in fields of refine (loss: policy loss; sharp: policy loss, temperature 0.5;",
        "on scoring and",
    ):
        assert words in page.text
    with pytest.raises(ValueError, match=r"--tokens: 100 is not more than what scoring costs arm loss for seed 0, \d+"):
        compare(config, comparison, 1, 100, silent)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no arms; write `name: {policy: loss}`"),
        ("- loss", "no arms; write"),
        ("loss: top", r"loss: 'top' is not a section; give fields of refine: \{policy: loss\}"),
        ("base: {policy: top}", "'base' cannot name an arm; start with a letter"),
        ("a/b: {policy: top}", "'a/b' cannot name an arm"),
        ("'1': {policy: top}", "'1' cannot name an arm"),
        ("a: {policy: best}", "a: policy: "),
        ("a: {polici: top}", "a: polici: "),
        ("a: {max_tokens: 100}", "a: max_tokens: 100 would be replaced, .*; remove it, and give --tokens"),
        (f"a: {'b' * 300}", "a: 'b{199}… is not a section"),
        ("b/" * 60 + ": {}", "'(b/){60}' cannot name an arm"),
    ],
)
def test_a_wrong_arm_is_named(config: RunConfig, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "arms.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^{path}: {message}"):
        arm_comparison(path, config.refine)


@pytest.mark.parametrize("name", ["sampling-rates", "rounds", "inits", "inherit"])
def test_a_file_of_arms_does_not_replace_another_comparison(config: RunConfig, tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.yaml"
    with pytest.raises(ValueError, match=f"^{path}: no such file; give a YAML file of arms"):
        arm_comparison(path, config.refine)
    path.write_text("loss: {policy: loss}")
    with pytest.raises(ValueError, match=f"^{path}: its results, compare-{name}, would replace those of another"):
        arm_comparison(path, config.refine)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, True),
        ({"sampling_rate": 1}, False),
        ({"sampling_rate": 1, "sources": [{"name": "a", "at_most": 0.5}]}, True),
        ({"sampling_rate": 1, "sources": [{"name": "a", "at_least": 0.5}]}, False),
        ({"policy": "random", "sources": [{"name": "a", "at_most": 0.5}]}, False),
    ],
)
def test_what_a_ceiling_drops_depends_on_losses(fields: dict[str, Any], expected: bool) -> None:
    assert needs_losses(RefineConfig.model_validate({"outlier_z": None, **fields})) == expected


def test_a_stopped_comparison_goes_on_and_repeats_nothing(
    config: RunConfig, fakes: FakeRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = policy_comparison("loss,random")
    fakes.fails_at = "random-seed-0 train-2"
    with pytest.raises(ValueError, match="killed"):
        compare(config, comparison, 1, None, silent)
    done = ["base-seed-0 train-1", "base-seed-0 score-1", "loss-seed-0 train-2", "random-seed-0 train-2"]
    assert fakes.jobs == done
    fakes.jobs, fakes.fails_at = [], ""
    page = compare(config, comparison, 1, None, silent).page
    assert fakes.jobs == ["random-seed-0 train-2"]
    assert "One seed shows no spread" in page.read_text()
    first, base = (page.parent / f"{arm}-seed-0" / "rounds" / "1" / "mix.parquet" for arm in ("loss", "base"))
    assert first.stat().st_ino == base.stat().st_ino
    fakes.jobs = []
    compare(
        config, policy_comparison("random"), 1, read_run(page.parent / "loss-seed-0").config.refine.max_tokens, silent
    )
    assert fakes.jobs == []
    with pytest.raises(ValueError, match=r"another configuration \(refine.max_tokens: \d+ there, 160 here\)"):
        compare(config, comparison, 1, 160, silent)
    with pytest.raises(
        ValueError, match=r"--tokens: 9999999 is more than the \d+ that arm (loss|random) reaches for seed 0; lower"
    ):
        compare(config, comparison, 1, 9_999_999, silent)


def test_initialisations_train_a_first_round_of_their_own_over_one_corpus(config: RunConfig, fakes: FakeRanks) -> None:
    page = compare(config, init_comparison("constant,gpt2"), 2, 300, silent)
    folder = page.page.parent
    assert fakes.jobs == [f"init-{name}-seed-{seed} train-1" for seed in (0, 1) for name in ("constant", "gpt2")]
    mixes = {(folder / f"init-{name}-seed-0" / "rounds/1/mix.parquet").read_bytes() for name in ("constant", "gpt2")}
    assert len(mixes) == 1
    assert read_run(folder / "init-constant-seed-1").config.model.init == "constant"
    with open_results(page.page.with_suffix(".parquet"), ["constant", "gpt2"]) as results:
        assert results.sql("from reference").fetchall() == [("gpt2",)]
        measured = results.sql("select loss from losses where source = 'a' and seed = 0 order by arm").fetchall()
        [(least, most)] = results.sql("select min(round_1_tokens), max(round_1_tokens) from results").fetchall()
    assert measured == [(pytest.approx(4.3),), (pytest.approx(4.1),)] and 280 < least <= most <= 300
    text = " ".join(page.text.split())
    # Losses of a over both seeds: 4.4 and 4.2; paired: 0.2 and 0.2.
    assert "| constant | 3.9500 | 3.5000 | 4.4000 | 2.6000 |" in text
    assert "| gpt2 | **3.7500** | **3.3000** | **4.2000** | **2.4000** |" in text
    assert "## Difference to arm gpt2, paired by seed" in text and "| a | +0.2000 ± 0.0000, 0 of 2 |" in text
    assert "Cost" not in text and f"Seeds 0 to 1. In each seed all arms train on {span(least, most)} predicted" in text
    fakes.jobs = []
    compare(config, init_comparison("constant,gpt2"), 2, 300, silent)
    assert fakes.jobs == []


def test_sampling_rates_and_rounds_share_what_they_can(config: RunConfig, fakes: FakeRanks) -> None:
    page = compare(config, rate_comparison("1,0,0.5"), 1, None, silent).page
    total = corpus_tokens(page.parent / "base-seed-0")
    assert [job for job in fakes.jobs if "base" not in job] == ["rate-0.5-seed-0 train-2", "rate-1-seed-0 train-2"]
    with open_results(page.with_suffix(".parquet"), ["0", "0.5", "1"]) as results:
        costs = results.sql("select trained_tokens, scoring_cost, cost from costs order by arm").fetchall()
        assert results.sql("from reference").fetchall() == [("0",)]
    scoring = round(total / 3)
    assert (costs[0], costs[2]) == ((0, 0, 0), (total, 0, total))
    assert costs[1][1:] == (scoring, costs[1][0] + scoring)
    fakes.jobs = []
    page = compare(config, round_comparison("1,3,2"), 1, None, silent).page
    assert fakes.jobs == ["rounds-2-seed-0 train-2", "rounds-3-seed-0 score-2", "rounds-3-seed-0 train-3"]
    with open_results(page.with_suffix(".parquet"), ["1", "2", "3"]) as results:
        scored = results.sql("select scoring_cost from costs order by arm").fetchall()
    assert scored == [(0,), (scoring,), (2 * scoring,)]
    assert {path.name for path in page.parent.glob("*.html")} == {"compare-sampling-rates.html", "compare-rounds.html"}


def test_sharing_is_all_or_nothing_and_copies_where_there_are_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "from" / "deep").mkdir(parents=True)
    for name in ("deep/.metadata", "plain", ".told-train"):
        (tmp_path / "from" / name).write_text(name)
    (tmp_path / ".to.sharing").mkdir()
    (tmp_path / ".to.sharing" / "left by a kill").touch()

    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    share(tmp_path / "from", tmp_path / "to")
    files = {str(path.relative_to(tmp_path / "to")) for path in (tmp_path / "to").rglob("*") if path.is_file()}
    assert files == {"deep/.metadata", "plain"}
    assert not (tmp_path / ".to.sharing").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies", "loss,best"], "--policies: 'best' is not a policy; choose from loss, loss_batch, top, band"),
        (["--policies", ","], "--policies: the list is empty; give comma-separated values"),
        (["--sampling-rates", "0,2"], "--sampling-rates: '0,2' is not between 0 and 1"),
        (["--sampling-rates", "half"], "--sampling-rates: 'half' is not a list of numbers"),
        (["--inits", "gpt2,zeros"], "--inits: 'zeros' is not an initialisation; choose from constant, gpt2, internlm"),
        (["--rounds", "1.5"], "--rounds: '1.5' contains a fraction"),
        (["--rounds", "2", "--tokens", "9"], "--tokens: only valid with --policies"),
        (["--rounds", "2", "--seeds", "0"], "--seeds: 0 is less than 1"),
    ],
)
def test_mistakes_are_named(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values(texts, tmp_path)))
    assert main(["compare", str(tmp_path / "config.yaml"), *arguments]) == 1
    assert capsys.readouterr().err.startswith(f"error: {message}")
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path / "config.yaml"), "--rounds", "1,2", "--policies", "loss"])
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml"}


@pytest.mark.slow
def test_a_real_comparison_is_killed_and_finished(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values(texts, tmp_path)))
    arguments = ["compare", str(tmp_path / "config.yaml"), "--policies", "loss,all"]
    command = [sys.executable, "-m", "flows.cli.main", *arguments]
    folder = tmp_path / "x-compare"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (folder / "loss-seed-0" / "rounds" / "2" / "mix.json").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    trained = folder / "base-seed-0" / "rounds" / "1" / "train.json"
    written = trained.stat().st_mtime_ns
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert trained.stat().st_mtime_ns == written
    with open_results(folder / "compare.parquet", ["loss", "all"]) as results:
        steps = results.sql("select num_steps, trained_tokens from costs").fetchall()
        assert results.sql("select count(*) from losses where loss < 2 or loss > 6").fetchall() == [(0,)]
    assert abs(steps[0][0] - steps[1][0]) <= 1 and abs(steps[0][1] - steps[1][1]) <= 16
    assert "## Difference to arm loss, paired by seed" in done.stdout
    # An arm is a run like any other.
    assert main(["report", str(folder / "loss-seed-0")]) == 0
    assert main(["sql", str(folder / "all-seed-0"), "select * from rounds"]) == 0
