"""The time of a run on this CPU, measured for a few seconds, compared with a run."""

import time
from pathlib import Path

import pytest

from data_scoring.base.progress import silent
from flows.planning import measured_speed
from flows.planning.corpus_size import CorpusSize
from flows.planning.duration import Duration
from flows.planning.measured_speed import MeasuredSpeed, is_measurable
from flows.planning.plan import make_plan
from flows.planning.workload import find_hardware, workload_of
from flows.run.config import RunConfig, parse_config
from flows.run.folder import open_run
from flows.stages.stage_order import complete, steps_of
from tests.conftest import TINY_MODEL, make_documents
from tests.forked_ranks import forking


def configured(folder: Path) -> RunConfig:
    (folder / "a.txt").write_text("\n".join(make_documents(400)))
    corpus = {"sources": [{"name": "a", "path": str(folder / "a.txt"), "document": "line"}], "seq_length": 64}
    return parse_config(
        {"name": "x", "output": str(folder), "device": "cpu", "corpus": corpus, "tokenizer": {"vocab_size": 300},
         "model": TINY_MODEL.model_dump(), "train": {"global_batch_size": 8, "micro_batch_size": 4}},
        "test",
    )  # fmt: skip


def test_a_plan_of_a_tiny_run_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a factor of 30, since tests share the machine; a few steps and starts take widely different times."""
    monkeypatch.setattr(measured_speed, "_SECONDS", 0.5)
    config = configured(tmp_path)
    with forking():
        plan = make_plan(config, find_hardware(config))
        run, seconds = open_run(config), {}
        for step in steps_of(config):
            started = time.monotonic()
            complete(run, step.stage.name, step.round_number, silent)
            seconds[step.name] = time.monotonic() - started
    assert plan.corpus is not None
    assert plan.corpus.num_samples == sum(run.corpus().num_samples(shard) for shard in range(8))
    for each in plan.rounds:
        assert each.train_seconds is not None
        assert 1 / 30 < each.train_seconds / seconds[f"train {each.number}"] < 30
    score = plan.rounds[0].score_seconds
    assert score is not None
    assert 1 / 30 < score / seconds["score 1"] < 30
    assert (plan.utilisation, plan.rounds[1].score_seconds) == (None, None)


def test_minutes_by_hand(tmp_path: Path) -> None:
    """100 samples, of which 20 are held out: 13 steps of 8, a validation at the end; scoring; half of them again."""
    config = configured(tmp_path)
    speed = MeasuredSpeed(launch=3.0, step=0.5, scored_token=1e-3, byte=1e-6)
    size = CorpusSize(100, 6400, 20, 1280, 12_800, 50_000, "a test")
    duration = Duration(config, workload_of(config, "cpu"), find_hardware(config), 0.4, speed)
    assert duration.tokens_per_second() == 8 * 64 / 0.5
    assert duration.training(100, 13, size) == pytest.approx(3.0 + 100 / 8 * 0.5 + 20 * 64 * 1e-3)
    assert duration.training(1000, 125, size) == pytest.approx(3.0 + 125 * 0.5 + 2 * 20 * 64 * 1e-3)
    assert duration.scoring(100, None) == pytest.approx(100 * 64 * 1e-3)
    assert duration.scoring(100, 16) == pytest.approx(100 * 16 * 1e-3)
    # Preparing the text, and four starts for Prefect and the report.
    assert duration.other(size) == pytest.approx(0.05 + 12.0)


def test_large_models_are_not_measured_on_cpu(tmp_path: Path) -> None:
    config = configured(tmp_path)
    hardware = find_hardware(config)
    assert is_measurable(config, workload_of(config, "cpu"), hardware)
    large = config.model_copy(update={"model": config.model.model_validate({"preset": "llama-1b"})})
    assert not is_measurable(large, workload_of(large, "cpu"), hardware)
