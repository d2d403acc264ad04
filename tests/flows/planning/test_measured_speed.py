"""The time of a run on this CPU, measured for a few seconds, compared with a run."""

import time
from pathlib import Path

import pytest

from data_scoring.base.progress import silent
from flows.planning import measured_speed
from flows.planning.measured_speed import is_measurable
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
    """Within a factor of four, since tests share the machine."""
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
        assert 1 / 4 < each.train_seconds / seconds[f"train {each.number}"] < 4
    score = plan.rounds[0].score_seconds
    assert score is not None
    assert 1 / 4 < score / seconds["score 1"] < 4
    assert (plan.utilisation, plan.rounds[1].score_seconds) == (None, None)


def test_large_models_are_not_measured_on_cpu(tmp_path: Path) -> None:
    config = configured(tmp_path)
    hardware = find_hardware(config)
    assert is_measurable(config, workload_of(config, "cpu"), hardware)
    large = config.model_copy(update={"model": config.model.model_validate({"preset": "llama-1b"})})
    assert not is_measurable(large, workload_of(large, "cpu"), hardware)
