"""Changes of a run's configuration: allowed until a stage that they concern has begun, then refused with a fork."""

import re
import shlex
import shutil
from dataclasses import replace

import pytest

from data_scoring.base.progress import silent
from flows.cli.main import main
from flows.run.config import RunConfig, differences, override
from flows.run.folder import Run, open_run, read_run
from flows.stages.changes import check_changes
from flows.stages.stage_order import complete_all, fingerprint_of, steps_of
from flows.stages.status import read_status
from tests.flows.fakes import FakeRanks

# Changes by the first stage that they concern.
CHANGES = {
    "mix 1": ["train.max_tokens=2000", "rounds.first_order=sources", "refine.sources=[{name: a, from_round: 2}]"],
    "train 1": ["train.lr=0.001", "model.num_layers=2", "train.global_batch_size=32"],
    "score 1": ["score.budget=seen", "score.budget=prefix:8", "score.budget=auto"],
    "refine 2": [
        "refine.policy=top", "refine.sampling_rate=0.25", "refine.sources=[{name: a, at_least: 0.9}]",
        "refine.within=part", "refine.outlier_z=null", "refine.weights=inverse", "refine.max_tokens=900",
        "{refine.policy: sql, refine.sql: loss + 1}",
    ],
    "train 2": ["rounds.lr_factor=0.5", "rounds.keep_optimizer=true"],
}  # fmt: skip
CASES = [(stage, change) for stage, changes in CHANGES.items() for change in changes]
ROUNDS = {"mix 1": 1, "train 1": 1, "score 1": 2, "refine 2": 2, "train 2": 2}


def changed(run: Run, change: str) -> RunConfig:
    """Return the configuration of `run` with one change, or with several in brackets."""
    changes = [change] if change[0] != "{" else [each.replace(": ", "=", 1) for each in change[1:-1].split(", ")]
    return override(run.config, changes).model_copy(update={"output": str(run.folder.parent)})


def undo(run: Run, stage: str) -> None:
    """Take the run back to where the stages before `stage` are complete."""
    names = [step.name for step in steps_of(run.config)]
    for step in steps_of(run.config)[names.index(stage) :]:
        folder = run.round_folder(step.round_number)
        run.forget(step.stage.name, step.round_number)
        for name in {"mix": ("mix.parquet",), "train": ("checkpoint",), "score": ("losses",)}.get(step.stage.name, ()):
            shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
        if step.stage.name == "refine":
            shutil.rmtree(folder / "selection")


@pytest.mark.parametrize(("stage", "change"), CASES)
def test_what_has_not_begun_may_change(three_rounds: Run, stage: str, change: str) -> None:
    new = changed(three_rounds, change)
    with pytest.raises(ValueError, match="created by another configuration"):
        open_run(new, check_changes)
    undo(three_rounds, stage)
    with pytest.raises(ValueError, match="created by another configuration"):
        # Trials are never changed.
        open_run(new)
    run = open_run(new, check_changes)
    assert differences(read_run(run.folder).config, new) == []
    names = [step.name for step in steps_of(new)]
    assert {row.name: row.state for row in read_status(run.folder)} == {
        name: "done" if place < names.index(stage) else "stopped" if name == stage else "waiting"
        for place, name in enumerate(names)
    }


def test_a_changed_run_is_completed(three_rounds: Run, fakes: FakeRanks) -> None:
    undo(three_rounds, "score 1")
    run = open_run(changed(three_rounds, "score.budget=prefix:8"), check_changes)
    complete_all(run, steps_of(run.config), silent)
    assert {row.state for row in read_status(run.folder)} == {"done"}


@pytest.mark.parametrize(("stage", "change"), CASES)
def test_a_refusal_names_the_fork_that_does_it(three_rounds: Run, stage: str, change: str) -> None:
    new = changed(three_rounds, change)
    with pytest.raises(ValueError, match="created by another configuration") as refused:
        check_changes(three_rounds, new)
    [command] = re.findall("`([^`]+)`", str(refused.value))
    number = ROUNDS[stage]
    assert command.startswith(f"reprise fork {three_rounds.folder} --round {number} --set ")
    assert main(shlex.split(command)[1:]) == 0
    made = read_run(three_rounds.folder.with_name(f"run-fork-{number}"))
    assert differences(made.config, new) == []
    for place in (1, 2, 3):
        # The run is that which has had this configuration from the start.
        assert fingerprint_of(made, "train", place) == fingerprint_of(replace(three_rounds, config=new), "train", place)


def test_scoring_that_has_begun_is_not_changed(three_rounds: Run) -> None:
    """Losses of one shard, without a record, are work that another budget would discard."""
    undo(three_rounds, "refine 2")
    three_rounds.forget("score", 1)
    (three_rounds.round_folder(1) / "losses" / "shard=0001.parquet").unlink()
    with pytest.raises(ValueError, match=r"\(score.budget: 'full' there, 'seen' here\); restore the fields, or fork"):
        check_changes(three_rounds, changed(three_rounds, "score.budget=seen"))


def test_several_changes_are_one_fork(three_rounds: Run) -> None:
    new = override(three_rounds.config, ["refine.policy=top", "score.budget=auto", "rounds.num_rounds=4", "device=npu"])
    sets = "--set score.budget=auto --set refine.policy=top --set rounds.num_rounds=4`"
    with pytest.raises(ValueError, match=re.escape(f"--round 2 {sets}")):
        check_changes(three_rounds, new)


@pytest.mark.parametrize("change", ["seed=1", "corpus.seq_length=8", "tokenizer.vocab_size=290"])
def test_another_corpus_needs_another_name(three_rounds: Run, change: str) -> None:
    undo(three_rounds, "mix 1")
    with pytest.raises(ValueError, match="; set another name, restore the fields, or delete the folder"):
        check_changes(three_rounds, changed(three_rounds, change))
