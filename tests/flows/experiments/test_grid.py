"""A grid of batch sizes and learning rates: its rates, failing cells, its page, and rejected requests."""

from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import yaml

from data_scoring.base.progress import silent
from data_scoring.refine.training_mix import Mix
from flows.cli.main import main
from flows.experiments.grid import Grid, base_rule, train_grid
from flows.experiments.grid_curves import draw_curves
from flows.experiments.trials import read_result
from flows.run.config import RunConfig, parse_config
from flows.run.errors import RanksFailedError
from flows.run.folder import read_run
from tests.flows.fakes import FakeRanks, values
from trainer.jobs import TrainJob


def by_rate(job: TrainJob, run: str) -> tuple[float, float]:
    """Return losses that are lowest at a peak of 4e-3, which seed 1 has a little higher."""
    loss = 4 + 10 * abs(float(job.train.lr) - 4e-3) * 10 + 0.01 * run.endswith("seed-1")
    return loss, loss


def test_rates_follow_the_batch_and_the_best_cell_is_marked(config: RunConfig, fakes: FakeRanks) -> None:
    fakes.losses = by_rate
    # The configuration's own: 2e-3 at 4 samples of 16 tokens.
    grid = Grid((64, 128), (0.5, 1.0), num_seeds=2, tokens=1500)
    page = train_grid(config, grid, silent)
    folder = page.page.parent
    for batch, rate, lr in ((64, 0.5, 2e-3), (128, 0.5, 2e-3 * 2**0.5), (128, 1, 4e-3)):
        run = read_run(folder / f"batch-{batch}-rate-{rate:g}-seed-1")
        row = read_result(run.config)
        assert run.config.resolved_train.lr == pytest.approx(lr) == row["lr"]
        assert run.config.resolved_train.min_lr == pytest.approx(lr / 10)
        assert run.config.resolved_train.global_batch_size == batch // 16
        mix = Mix(run.round_folder(1) / "mix.parquet")
        assert row["num_steps"] == -(-len(mix) * 16 // batch)
        assert 1400 < row["num_tokens"] <= 1500 and row["loss"] == pytest.approx(4.01 + 100 * abs(lr - 4e-3))
    # At the rule's own batch every rate is the same: it is trained once.
    assert not (folder / "batch-64-rate-1-seed-0").exists() and len(fakes.jobs) == 6
    text = " ".join(page.text.split())
    assert "Lowest: batches of 128 tokens at r = 1, peak 0.004, validation loss 4.0050." in text
    assert "**4.0050 ± 0.0071** | 0.004 |" in text
    assert "Batches of 128 tokens make fewer than 20 steps" in text
    assert "(batch / 64)^r × 0.002, from the configuration's own train.lr and batch" in text
    assert page.page.read_text().count("data:image/png;base64,") == 2 and "<b>4.0050" in page.page.read_text()
    fakes.jobs = []
    train_grid(config, grid, silent)
    assert fakes.jobs == []
    # Another number of tokens is another grid: it is refused, and what there is stays.
    with pytest.raises(ValueError, match=r"another configuration \(train.max_tokens: 1500 there, 1400 here\)"):
        train_grid(config, replace(grid, tokens=1400), silent)
    assert read_result(run.config) == row
    fakes.fails_at = "batch-64-rate-0.5-seed-0 train-1"
    with pytest.raises(RanksFailedError, match=r"all trials failed .*; the first error: killed"):
        train_grid(config.model_copy(update={"name": "y"}), Grid((64,), (0.5,), tokens=1500), silent)


def test_a_cell_that_fails_ends_none_of_the_others(config: RunConfig, fakes: FakeRanks) -> None:
    fakes.losses, fakes.fails_at = by_rate, "batch-128-rate-1-seed-0 train-1"
    rule = {"rule": "scaled", "base_lr": 1e-3, "base_tokens": 32, "increment_rate": 0.7}
    config = parse_config({**config.model_dump(), "train": {**config.train.model_dump(), "lr": rule}}, "test")
    assert base_rule(config).at(64) == pytest.approx(1e-3 * 2**0.7)
    page = train_grid(config, Grid((128,), (0.5, 1.0), tokens=1500), silent)
    text = " ".join(page.text.split())
    assert len(fakes.jobs) == 2 and "| batch-128-rate-1-seed-0 | killed |" in text and "failed |" in text
    assert "(batch / 32)^r × 0.001, from train.lr;" in text
    assert "Lowest: batches of 128 tokens at r = 0.5, peak 0.002" in text
    fakes.jobs, fakes.fails_at = [], ""
    page = train_grid(config, Grid((128,), (0.5, 1.0), tokens=1500), silent)
    assert fakes.jobs == ["batch-128-rate-1-seed-0 train-1"]
    assert "Lowest: batches of 128 tokens at r = 1, peak 0.004" in page.text and "Failures" not in page.text


def test_curves_are_means_of_smoothed_seeds_in_a_panel_for_each_batch() -> None:
    def run(num_steps: int, last: float) -> tuple[np.ndarray, np.ndarray]:
        return np.arange(1, num_steps + 1) * 1e6 / num_steps, np.linspace(6, last, num_steps)

    nothing = (np.empty(0), np.empty(0))
    curves = {
        (64, 0.5): [run(60, 4.0), run(59, 3.0)],
        (64, 1.0): [run(60, 4.0), run(59, 3.0)],
        (128, 0.5): [run(30, 5.0), run(30, 5.0)],
        # A run that diverges, and one that failed at once.
        (128, 1.0): [run(9, 900.0), run(9, 900.0)],
        (256, 0.5): [run(15, 5.0), nothing],
    }
    figure = draw_curves(curves, 64)
    assert figure is not None
    # The base has no panel of its own, and 256 nothing to show.
    [panel] = figure.axes
    assert panel.get_title() == "batch of 128 tokens"
    lines = {line.get_label(): line for line in panel.get_lines()}
    assert [*lines] == ["batch 64, any r: 3.508", "r = 0.5: 5.000", "r = 1: 900.000"]
    first, second, third = lines.values()
    # Of 60 and 59 steps, windows of 2 and 1.
    expected = [(curves[64, 0.5][0][1][n] + curves[64, 0.5][0][1][n + 1]) / 4 + curves[64, 0.5][1][1][n] / 2
                for n in range(59)]  # fmt: skip
    np.testing.assert_allclose(first.get_ydata(), expected)
    assert len({line.get_color() for line in (first, second, third)}) == 3
    # Of what does not diverge, all losses from a tenth of the tokens on are inside, and little else.
    low, high = panel.get_ylim()
    assert low < 3.508 and 5.7 < high < 6.2
    [alone] = draw_curves({(64, 0.5): curves[64, 0.5]}, 64).axes
    assert [line.get_label() for line in alone.get_lines()] == ["batch 64: 3.508"]
    only = draw_curves({(128, 1.0): curves[128, 1.0]}, 64)
    assert only.axes[0].get_ylim()[0] < 6 and len(only.axes[0].get_lines()) == 1
    assert draw_curves({(256, 0.5): [nothing]}, 64) is None
    plt.close("all")


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--batch-tokens", "64,100,48"], [
            "error: --batch-tokens 48: train.global_batch_size: 3 is not a multiple of train.micro_batch_size 2",
            "--batch-tokens 100: train.global_batch_tokens: 100 is not a multiple of corpus.seq_length 16; take 96",
        ]),
        (["--batch-tokens", "64,many"], ["error: --batch-tokens: 'many' is not a number of tokens; give"]),
        (["--batch-tokens", "64", "--increment-rates", "3"], ["error: --increment-rates: '3' is not between 0 and 2"]),
    ],
)  # fmt: skip
def test_mistakes_are_named_before_anything_trains(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], messages: list[str]
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values(texts, tmp_path)))
    assert main(["grid", str(tmp_path / "config.yaml"), *arguments]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(messages)
    for line, message in zip(lines, messages, strict=True):
        assert line.startswith(message)
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml"}
