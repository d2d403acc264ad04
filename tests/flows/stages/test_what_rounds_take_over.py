"""A run whose rounds draw within parts, weight samples, lower the learning rate and keep the optimizer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_scoring.base.progress import silent
from data_scoring.ledger import open_ledger, read_rows
from flows.report.curves import forgetting_by_part, forgetting_curve
from flows.report.run_report import write_report
from flows.report.tables import summary
from flows.run.config import RunConfig, parse_config
from flows.run.folder import Run, open_run, read_run
from flows.run.locks import locked
from flows.stages.refine import selection_of
from flows.stages.stage_order import complete_all, is_complete, steps_of
from tests.conftest import make_documents
from tests.forked_ranks import forking

PARTS = 4


def configure(folder: Path, **changes: Any) -> RunConfig:
    values = {
        "name": "run", "output": str(folder), "device": "cpu",
        "corpus": {
            "sources": [{"name": "a", "path": str(folder / "a.txt"), "document": "line"}],
            "seq_length": 32, "num_shards": 3, "validation_fraction": 0.1,
        },
        "tokenizer": {"vocab_size": 300},
        "model": {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "ffn_hidden_size": 16},
        "train": {"global_batch_size": 8, "micro_batch_size": 4, "lr": 0.01, "warmup_fraction": 0},
        "score": {"budget": "full"},
        "refine": {"within": "part", "weights": "inverse", "max_weight": 1.5},
        "rounds": {"num_rounds": 3, "num_parts": PARTS, "lr_factor": 0.5, "keep_optimizer": True},
        **changes,
    }  # fmt: skip
    return parse_config(values, "test")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("taken-over")
    (folder / "a.txt").write_text("\n".join(make_documents(120)))
    config = configure(folder)
    with locked(config.folder), forking():
        run = open_run(config)
        complete_all(run, steps_of(config), silent)
    return run


def test_the_peak_falls_from_round_to_round(run: Run) -> None:
    peaks = read_rows(run.folder, "select round, max(lr), min(lr) from steps group by round order by round")
    for number, highest, lowest in peaks:
        peak = 0.01 * 0.5 ** (number - 1)
        assert peak * 0.9 < highest <= peak * (1 + 1e-6)
        assert lowest < peak * 0.3
    assert len(peaks) == 3


def test_every_part_keeps_its_half(run: Run) -> None:
    for number in (2, 3):
        parts = read_rows(
            run.folder,
            f"""select coalesce((place * {PARTS}) // total, {PARTS}) as part, count(*), count(*) filter (kept)
            from selection left join (select *, count(*) over () as total from mix where round = {number - 1}) as mix
                on mix.shard = selection.shard and mix.sample = selection.sample
            where selection.round = {number} group by part order by part""",
        )
        # Round 3 also draws from the samples that round 2 did not train on.
        assert [part for part, *_ in parts] == list(range(PARTS + (number == 3)))
        assert [kept for *_, kept in parts] == [int(count / 2 + 0.5) for _, count, _ in parts]
        slices = selection_of(run, number).parts
        assert [(int(each.name), each.num_samples, each.num_kept) for each in slices] == parts
    assert "| part | samples |" in summary(selection_of(run, 3)).replace("  ", " ")


def test_the_mix_has_the_weights_of_the_draw(run: Run) -> None:
    assert read_rows(run.folder, "select distinct weight from mix where round = 1") == [(1.0,)]
    for number in (2, 3):
        rows = read_rows(
            run.folder,
            f"""select weight, probability from mix join selection using (round, shard, sample)
            where round = {number}""",
        )
        weights, probabilities = np.array(rows).T
        assert weights.mean() == pytest.approx(1, abs=1e-6)
        assert weights.max() <= 1.5 * (1 + 1e-6)
        below = weights < 1.4999
        products = (weights * probabilities)[below]
        np.testing.assert_allclose(products, products[0], rtol=1e-5)
        assert weights.std() > 0.05


def test_the_forgetting_figure_has_the_parts(run: Run) -> None:
    with open_ledger(run.folder) as ledger:
        parts = forgetting_by_part(ledger, 1, PARTS)
        rows = ledger.sql(
            """select mix.place, seen.loss as seen, losses.loss from mix join seen using (round, shard, sample)
            join losses using (round, shard, sample) where round = 1 order by place"""
        ).fetchnumpy()
        figure = forgetting_curve(1, PARTS)(ledger)
        assert forgetting_curve(9, PARTS)(ledger) is None
    stretches = np.arange(len(rows["place"])) * PARTS // len(rows["place"])
    for part, count, seen, loss in parts:
        mine = stretches == part
        assert count == mine.sum()
        assert seen == pytest.approx(rows["seen"][mine].mean(dtype=float), rel=1e-6)
        assert loss == pytest.approx(rows["loss"][mine].mean(dtype=float), rel=1e-6)
    assert [part for part, *_ in parts] == list(range(PARTS))
    assert figure is not None
    fine, coarse = figure.axes
    assert [len(line.get_xdata()) for line in coarse.lines] == [PARTS, PARTS]
    assert len(fine.lines[0].get_xdata()) > PARTS
    write_report(run)


def test_a_run_that_is_opened_again_is_complete(run: Run) -> None:
    again = read_run(run.folder)
    for step in steps_of(again.config):
        assert is_complete(again, step.stage.name, step.round_number)


@pytest.mark.parametrize(
    ("rounds", "train", "message"),
    [
        ({"lr_factor": 0.1, "num_rounds": 3}, {"min_lr": 1e-3}, "round 3 a peak learning rate of 0.0001, which is not"),
        (
            {"lr_factor": 50, "num_rounds": 3},
            {},
            "rounds.lr_factor: 50 gives round 3 a peak learning rate of 25, which",
        ),
    ],
)
def test_a_factor_that_leaves_the_bounds_is_refused(
    rounds: dict[str, Any], train: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        configure(tmp_path, rounds=rounds, train={"lr": 0.01, **train})


def test_a_round_s_rates_follow_the_factor(tmp_path: Path) -> None:
    config = configure(tmp_path, train={"lr": 0.01, "min_lr": 5e-4})
    assert [(config.train_of(number).lr, config.train_of(number).min_lr) for number in (1, 2, 3)] == [
        (0.01, 5e-4), (0.005, 5e-4), (0.0025, 5e-4),
    ]  # fmt: skip
    assert config.train_of(1) == config.resolved_train
