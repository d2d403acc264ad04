"""Scoring within a budget as a stage of a run: what is launched, what is kept, and what the report says of it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_scoring.base.parquet import write_parquet
from data_scoring.base.progress import silent
from data_scoring.corpus.corpus import Corpus
from data_scoring.losses.calibration import calibrate, draw_calibration_set
from data_scoring.losses.origin import read_origin, with_origin
from data_scoring.losses.shard_scoring import LossFiles, losses_path, score_shards
from data_scoring.refine.refine_config import RefineConfig
from data_scoring.sandboxed_query import ask
from flows.launch import launcher
from flows.report.run_report import write_report
from flows.report.tables import budgets
from flows.run.config import RunConfig, parse_config
from flows.run.folder import Run, open_run
from flows.stages.refine import preview
from flows.stages.stage_order import complete, fingerprint_of
from tests.conftest import make_documents
from tests.data_scoring.losses.test_shard_scoring import FakeScorer, InterruptedScoringError
from tests.data_scoring.refine.test_budget import PrefixScorer, everything, write_seen
from trainer.job import Job
from trainer.jobs import CalibrateJob, ScoreJob


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose first round is as good as trained."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "text.txt").write_text("\n".join(make_documents(150)))
    run = open_run(config_of(folder, {}))
    complete(run, "prepare", 0, silent)
    return folder


def config_of(folder: Path, score: dict[str, object]) -> RunConfig:
    source = {"name": "a", "path": str(folder / "text.txt"), "document": "line"}
    values = {
        "name": "run", "output": str(folder), "device": "cpu", "tokenizer": {"vocab_size": 300}, "score": score,
        "corpus": {"sources": [source], "seq_length": 32, "num_shards": 3},
    }  # fmt: skip
    return parse_config(values, "test")


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    shutil.copytree(prepared / "run", tmp_path / "run")
    shutil.copy(prepared / "text.txt", tmp_path)
    return tmp_path


def open_trained(prepared: Path, folder: Path, score: dict[str, object]) -> Run:
    # The source is where it was: its path is part of what identifies the corpus.
    config = config_of(prepared, score).model_copy(update={"output": str(folder)})
    run = Run(config, folder / "run")
    complete(run, "mix", 1, silent)
    checkpoint = run.round_folder(1) / "checkpoint" / "step-00000009"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "reprise.json").write_text(json.dumps({"step": 9}))
    write_seen(run.round_folder(1), 1, everything(run.corpus()))
    run.record("train", 1, fingerprint_of(run, "train", 1), 0.0, [])
    return run


class Launches:
    """Does jobs here, with a scorer of numpy's, and notes which."""

    def __init__(self, blocks: int = 1_000_000) -> None:
        self.jobs: list[Job] = []
        self.blocks = blocks

    def __call__(self, job: Job, run_folder: Path, name: str, *_: object) -> None:
        self.jobs.append(job)
        corpus = Corpus(job.corpus)
        sizes = [corpus.num_samples(shard) for shard in range(corpus.num_shards)]
        if isinstance(job, CalibrateJob):
            drawn = draw_calibration_set(sizes, job.score.calibration_samples, job.seed, job.round_number)
            scorer = PrefixScorer(corpus, 8)
            calibrate(corpus, job.round_folder, drawn, scorer, job.fingerprint, job.origin, silent)
            return
        assert isinstance(job, ScoreJob)
        files = LossFiles(job.round_folder, corpus, job.prefix or 32, job.fingerprint, job.origin, 0.0)
        score_shards(corpus, FakeScorer(corpus, 8, self.blocks), files, silent)


def counted(run: Run) -> tuple[object, ...]:
    [row] = ask(run.folder, "select count(*), min(num_tokens), max(num_tokens) from losses").fetchall()
    return tuple(row)


def test_auto_calibrates_and_then_scores_by_the_cheapest_that_will_do(
    prepared: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = Launches()
    monkeypatch.setattr(launcher, "launch", launches)
    run = open_trained(prepared, folder, {"budget": "auto", "min_correlation": 0.5, "calibration_samples": 100})
    assert complete(run, "score", 1, silent)
    assert not complete(run, "score", 1, silent)
    rows = budgets(run, 1)
    [chosen] = [row["candidate"] for row in rows if row["chosen"]]
    assert {row["candidate"] for row in rows} == {
        "seen", "prefix:4", "prefix:8", "prefix:16", "full", "calibration"
    }  # fmt: skip
    assert chosen.startswith("prefix:")
    fit = [row for row in rows if row["correlation"] is not None and row["correlation"] >= 0.5]
    assert min(fit, key=lambda row: row["cost_tokens"])["candidate"] == chosen
    assert [type(job) for job in launches.jobs] == [CalibrateJob, ScoreJob]
    assert counted(run)[2] == int(chosen.removeprefix("prefix:"))
    complete(run, "refine", 2, silent)
    page = write_report(run).read_text()
    assert f"Samples were scored by {chosen}, which costs as much as training on" in page
    assert "with a rank correlation of 0.5 or more" in page
    assert "<td>calibration<td><td><td>" in page


def test_the_report_says_of_which_draws_the_shares_are(
    prepared: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run may go on with another `refine` after scoring, and a person may approve another rate."""
    monkeypatch.setattr(launcher, "launch", Launches())
    run = open_trained(prepared, folder, {"budget": "auto", "min_correlation": 0.5, "calibration_samples": 100})
    complete(run, "score", 1, silent)
    before = [row["overlap"] for row in budgets(run, 1)]
    assert "draws with sampling rate" not in write_report(run).read_text()
    refine = run.config.refine.model_copy(update={"sampling_rate": 0.1, "temperature": 2.0})
    changed = replace(run, config=run.config.model_copy(update={"refine": refine}))
    assert not complete(changed, "score", 1, silent)
    assert [row["overlap"] for row in budgets(changed, 1)] == before
    said = "draws with sampling rate 0.5 and temperature 1, as refine was when samples were scored. Round 2 has "
    assert f"{said}sampling rate 0.1 and temperature 2.</p>" in write_report(changed).read_text()
    run.approve(2, "loss", 0.25)
    assert f"{said}sampling rate 0.25 and temperature 1.</p>" in write_report(run).read_text()
    # Scored by a version that did not record them.
    path = run.round_folder(1) / "budget.parquet"
    write_parquet(path, pq.read_table(path).drop_columns(["sampling_rate", "temperature"]), "f")
    assert "draws with sampling rate" not in write_report(run).read_text()


def test_auto_goes_on_after_its_calibration(prepared: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_trained(prepared, folder, {"budget": "auto", "min_correlation": 1.0, "calibration_samples": 20})
    launches = Launches(blocks=3)
    monkeypatch.setattr(launcher, "launch", launches)
    with pytest.raises(InterruptedScoringError):
        complete(run, "score", 1, silent)
    assert launches.jobs[1].saved_work() == (0, 3)
    # What a killed attempt notes.
    note = run.round_folder(1) / "scoring-time.json"
    note.write_text(json.dumps({"identity": fingerprint_of(run, "score", 1), "seconds": 100.0}))
    again = Launches()
    monkeypatch.setattr(launcher, "launch", again)
    assert complete(run, "score", 1, silent)
    assert [type(job) for job in again.jobs] == [ScoreJob]
    assert counted(run)[2] == 32
    [first] = scoring_seconds(run)
    assert 100 < first < 160
    assert not note.exists()
    # Killed between the budget and the stage's record.
    run.forget("score", 1)
    assert complete(run, "score", 1, silent)
    [second] = scoring_seconds(run)
    assert first < second < 160


def scoring_seconds(run: Run) -> list[float]:
    """Return the seconds of the rows of `budgets` that have some."""
    return [row["seconds"] for row in budgets(run, 1) if row["seconds"] is not None]


def test_seen_launches_nothing(prepared: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "launch", Launches(blocks=0))
    run = open_trained(prepared, folder, {"budget": "seen"})
    assert complete(run, "score", 1, silent)
    total = len(everything(run.corpus()))
    assert counted(run)[0] == total
    assert ask(run.folder, "select count(*) from seen join losses using (shard, sample, loss)").fetchall() == [(total,)]
    [row] = budgets(run, 1)
    assert 0 < row.pop("seconds") < 60
    assert [row] == [
        {"candidate": "seen", "correlation": None, "overlap": None, "chance_overlap": None, "sampling_rate": None,
         "temperature": None, "cost_tokens": 0, "chosen": True}
    ]  # fmt: skip
    assert "Samples were scored by seen, which costs as much as training on 0 tokens" in write_report(run).read_text()


def test_how_it_is_scored_is_part_of_what_scores_are(prepared: Path, folder: Path) -> None:
    runs = [
        Run(config_of(prepared, score), folder / "run")
        for score in ({}, {"budget": "seen"}, {"min_correlation": 0.5}, {"calibration_samples": 10})
    ]
    complete(runs[0], "mix", 1, silent)
    assert len({fingerprint_of(run, "score", 1) for run in runs}) == len(runs)
    smaller = Run(config_of(prepared, {"micro_batch_size": 1}), folder / "run")
    assert fingerprint_of(smaller, "score", 1) == fingerprint_of(runs[0], "score", 1)


def test_a_mix_of_scores_is_refused(prepared: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "launch", Launches())
    run = open_trained(prepared, folder, {"budget": "full"})
    complete(run, "score", 1, silent)
    path = losses_path(run.round_folder(1), 1)
    table = pq.read_table(path)
    metadata = {key: value.replace(b"float32", b"bfloat16") for key, value in table.schema.metadata.items()}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    # As if scoring had written it so.
    run.record("score", 1, fingerprint_of(run, "score", 1), 0.0, [])
    for look in (lambda: complete(run, "refine", 2, silent), lambda: preview(run, 2)):
        with pytest.raises(ValueError, match=r"shard=0001.parquet: .*: precision is 'bfloat16' here and 'float3"):
            look()


def test_losses_that_cannot_be_compared_are_refused_before_anything_is_drawn(
    prepared: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "launch", Launches())
    run = open_trained(prepared, folder, {"budget": "prefix:8"})
    complete(run, "score", 1, silent)
    with pytest.raises(
        ValueError, match=r"refine.policy: forgetting compares .* round 1 was scored with score.budget prefix:8"
    ):
        preview(run, 2, RefineConfig(policy="forgetting"))
    with pytest.raises(ValueError, match="has no losses; give the folder of a scored round"):
        preview(run, 2, RefineConfig(policy="excess", reference=str(tmp_path / "none")))
    reference = tmp_path / "reference"
    shutil.copytree(run.round_folder(1), reference)
    alike = RefineConfig(policy="excess", reference=str(reference))
    assert 0 < preview(run, 2, alike).total.share < 1
    # What follows is written as if it had been scored there.
    (reference / "score.json").unlink()
    excess = Run(run.config.model_copy(update={"refine": alike}), run.folder)
    before = fingerprint_of(excess, "refine", 2)
    for shard in range(3):
        path = losses_path(reference, shard)
        table = with_origin(pq.read_table(path), replace(read_origin(path), budget="full"))
        write_parquet(path, table, "scored in full")
    assert fingerprint_of(excess, "refine", 2) != before
    with pytest.raises(
        ValueError, match="was scored with budget 'full' and this run with 'prefix:8'; score both in the same way"
    ):
        preview(run, 2, alike)
