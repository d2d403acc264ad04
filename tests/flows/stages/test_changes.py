"""Changes of a run's configuration: allowed until a stage that they concern has begun, then refused with a fork."""

import re
import shlex
from pathlib import Path

import pytest

from data_scoring.base.progress import silent
from flows.cli.main import main
from flows.run.config import RunConfig, differences, override
from flows.run.folder import Run, open_run, read_run
from flows.stages.changes import check_changes
from flows.stages.stage_order import complete_all, fingerprint_of, steps_of
from flows.stages.status import read_status
from tests.flows.complete_runs import complete_run, config_of
from tests.flows.fakes import FakeRanks

# The first stage that a change concerns, in a run of two rounds.
CHANGES = {
    "mix 1": ["train.max_tokens=2000", "rounds.first_order=sources", "refine.sources=[{name: a, from_round: 2}]"],
    "train 1": ["train.lr=0.001", "model.num_layers=2", "train.global_batch_size=8"],
    "score 1": ["score.budget=seen", "score.budget=prefix:8"],
    "refine 2": [
        "refine.policy=top", "refine.sampling_rate=0.25", "refine.sources=[{name: a, at_least: 0.9}]",
        "refine.within=part", "refine.outlier_z=null", "refine.weights=inverse", "refine.max_tokens=900",
    ],
    "train 2": ["rounds.lr_factor=0.5", "rounds.keep_optimizer=true"],
}  # fmt: skip
CASES = [(stage, change) for stage, changes in CHANGES.items() for change in changes]


def start(config: RunConfig, stage: str, is_begun: bool) -> Run:
    """Return the run of `config` in which the stages before `stage` are complete, or those up to it."""
    run = open_run(config)
    names = [step.name for step in steps_of(config)]
    complete_all(run, steps_of(config)[: names.index(stage) + is_begun], silent)
    return run


@pytest.mark.parametrize(("stage", "change"), CASES)
def test_what_has_not_begun_may_change(tmp_path: Path, texts: Path, fakes: FakeRanks, stage: str, change: str) -> None:
    old = config_of(tmp_path, texts=texts)
    run = start(old, stage, is_begun=False)
    new = override(old, [change])
    with pytest.raises(ValueError, match="created by another configuration"):
        # Trials are never changed.
        open_run(new)
    run = open_run(new, check_changes)
    assert differences(read_run(run.folder).config, new) == []
    complete_all(run, steps_of(new), silent)
    assert {row.state for row in read_status(run.folder)} == {"done"}


@pytest.mark.parametrize(("stage", "change"), CASES)
def test_a_refusal_names_the_fork_that_does_it(
    tmp_path: Path, texts: Path, fakes: FakeRanks, stage: str, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    old = config_of(tmp_path, texts=texts)
    run = start(old, stage, is_begun=True)
    new = override(old, [change])
    with pytest.raises(ValueError, match="created by another configuration") as refused:
        open_run(new, check_changes)
    [command] = re.findall("`([^`]+)`", str(refused.value))
    number = 1 if stage.endswith("1") and stage != "score 1" else 2
    assert command.startswith(f"reprise fork {run.folder} --round {number} --set {change.partition('=')[0]}=")
    assert main(shlex.split(command)[1:]) == 0
    made = read_run(run.folder.with_name(f"run-fork-{number}"))
    assert differences(made.config, new) == []
    whole = complete_run(made.config)
    assert fingerprint_of(whole, "train", 2) == fingerprint_of(Run(new, whole.folder), "train", 2)


def test_scoring_that_has_begun_is_not_changed(tmp_path: Path, texts: Path, fakes: FakeRanks) -> None:
    """Losses of one shard, without a record, are work that another budget would discard."""
    old = config_of(tmp_path, texts=texts)
    run = start(old, "score 1", is_begun=True)
    run.forget("score", 1)
    (run.round_folder(1) / "losses" / "shard=0001.parquet").unlink()
    with pytest.raises(ValueError, match=r"\(score.budget: 'full' there, 'seen' here\); restore the fields, or fork"):
        open_run(override(old, ["score.budget=seen"]), check_changes)


def test_several_changes_are_one_fork(tmp_path: Path, texts: Path, fakes: FakeRanks) -> None:
    old = config_of(tmp_path, texts=texts)
    start(old, "train 2", is_begun=True)
    new = override(old, ["refine.policy=top", "score.budget=auto", "rounds.num_rounds=3", "parallel.data=2"])
    sets = "--set score.budget=auto --set refine.policy=top --set rounds.num_rounds=3`"
    with pytest.raises(ValueError, match=re.escape(f"--round 2 {sets}")):
        open_run(new, check_changes)


@pytest.mark.parametrize("change", ["seed=1", "corpus.seq_length=8", "tokenizer.vocab_size=290"])
def test_another_corpus_needs_another_name(tmp_path: Path, texts: Path, fakes: FakeRanks, change: str) -> None:
    old = config_of(tmp_path, texts=texts)
    start(old, "mix 1", is_begun=False)
    with pytest.raises(ValueError, match="; set another name, restore the fields, or delete the folder"):
        open_run(override(old, [change]), check_changes)
