"""Jobs are written and read back by the name of their class, which may be in any module."""

import json
from pathlib import Path

import pytest

from data_scoring.base.files import read_json, write_record
from data_scoring.config import padded_vocab_size
from tests.conftest import TINY_MODEL, Ranks
from tests.trainer.counting_job import counting, read_counts
from trainer.job import read_job, write_job


def test_a_job_is_read_back_as_it_was_written(ranks: Ranks, tmp_path: Path) -> None:
    for job in (ranks.job("written", start_from=tmp_path), counting(ranks, "written")):
        write_job(job, tmp_path / "job.json")
        assert read_job(tmp_path / "job.json") == job
    content = json.loads((tmp_path / "job.json").read_text())
    assert content["class"] == "tests.trainer.counting_job:CountingJob"


def test_what_is_no_job_is_not_made(ranks: Ranks, tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    write_job(ranks.job("written"), path)
    content = read_json(path)
    write_record(path, {**content, "class": "subprocess:Popen"})
    with pytest.raises(ValueError, match=r"class: 'subprocess:Popen' is not a subclass of trainer.job.Job"):
        read_job(path)


def test_a_job_of_another_module_runs_on_two_ranks(ranks: Ranks) -> None:
    job = counting(ranks, "counted")
    ranks.launch(job, "counted")
    vocab_size = padded_vocab_size(ranks.corpus.vocab_size)
    num_tokens = int(ranks.corpus.lengths(0).sum())
    assert read_counts(job) == {"num_parameters": TINY_MODEL.num_parameters(vocab_size), "num_tokens": num_tokens}


def test_training_has_saved_its_last_checkpoint(ranks: Ranks) -> None:
    job = ranks.job("saving")
    assert job.saved_work() == ()
    for step in (3, 12):
        checkpoint = job.round_folder / "checkpoint" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "reprise.json").write_text(json.dumps({"step": step}))
        assert job.saved_work() == (f"step-{step:08d}",)
