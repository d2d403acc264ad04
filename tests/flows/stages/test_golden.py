"""Run folders that 0.6 made, without their tensors: what they hold as done stays done, and every fingerprint the same.

`golden/fingerprints.json` was written by that version too. A change of one of them trains somebody's run anew.
"""

import importlib.metadata
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from data_scoring.base.files import fingerprint
from data_scoring.base.parquet import parquet_fingerprint
from flows.run.config import override, read_config
from flows.run.folder import Run, open_run, read_run
from flows.stages.score import origin_of
from flows.stages.stage_order import fingerprint_of, is_complete
from flows.stages.status import read_status

_GOLDEN = Path(__file__).with_name("golden")
_FINGERPRINTS: dict[str, dict[str, str]] = json.loads((_GOLDEN / "fingerprints.json").read_text())
# Each is what one of the places that decide about fingerprints looks at.
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "plain": ("plain", []),
    "inherited": ("inherited", []),
    "neutral": (
        "plain",
        ["train.micro_batch_size=4", "train.loss_kernel=chunked", "refine.memory_gb=1", "score.micro_batch_size=8"],
    ),
    "weights": ("plain", ["train.lr=0.001", "model.activation_terms=3", "model.tied_embeddings=true"]),
    "excess": ("plain", ["refine.policy=excess", "refine.reference=runs/plain/rounds/1"]),
    "late": (
        "plain",
        ["train.max_tokens=2000", "refine.sources=[{name: b, from_round: 2}]"],
    ),
    "start": ("plain", ["model.start_from=somewhere", "eval.contamination='off'", "eval.tasks=[]"]),
    "full": ("plain", ["score.budget=full", "refine.policy=top", "refine.temperature=2", "seed=8"]),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the two runs, where paths of their configurations hold."""
    shutil.copytree(_GOLDEN, tmp_path / "runs")
    shutil.move(tmp_path / "runs" / "items", tmp_path / "items")
    monkeypatch.chdir(tmp_path)
    # Prompts are lm_eval's: its version counts, here always the one of that time.
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.4.13" if name == "lm_eval" else version(name))
    return tmp_path / "runs"


def variant(folder: Path, name: str) -> Run:
    origin, overrides = VARIANTS[name]
    run = read_run(folder / origin)
    return replace(run, config=override(run.config, overrides))


def fingerprints(run: Run) -> dict[str, str]:
    """Return the fingerprint of every stage of two rounds that the run has."""
    stages = [("prepare", 0)]
    if run.config.model.inherits:
        stages.append(("inherit", 1))
    for number in (1, 2):
        stages += [("mix", number), ("train", number), ("score", number), ("evaluate", number)]
    stages.append(("refine", 2))
    return {f"{stage} {number}": fingerprint_of(run, stage, number) for stage, number in stages}


@pytest.mark.parametrize("name", VARIANTS)
def test_fingerprints_are_those_of_0_6(folder: Path, name: str) -> None:
    assert fingerprints(variant(folder, name)) == _FINGERPRINTS[name]


@pytest.mark.parametrize("name", ["plain", "inherited"])
def test_what_was_done_is_done(folder: Path, name: str) -> None:
    rows = {row.name: row.state for row in read_status(folder / name)}
    assert set(rows.values()) == {"done"}
    assert {"prepare", "mix 1", "train 1", "score 1", "refine 2", "mix 2", "train 2"} <= set(rows)


@pytest.mark.parametrize("name", ["plain", "inherited"])
def test_a_configuration_as_it_was_written_then_opens_the_folder(folder: Path, name: str) -> None:
    run = open_run(read_config(_GOLDEN / f"{name}.yaml", []))
    assert run.folder == folder / name
    assert is_complete(run, "train", 2)


@pytest.mark.parametrize("name", ["plain", "inherited"])
def test_losses_are_of_the_checkpoint_that_is_there(folder: Path, name: str) -> None:
    run = read_run(folder / name)
    found = {parquet_fingerprint(path) for path in run.round_folder(1).glob("losses/*.parquet")}
    origin = origin_of(run, 1, fingerprint_of(run, "train", 1), "full")
    assert found == {fingerprint("losses", fingerprint_of(run, "score", 1), asdict(origin))}
