"""What is said when ranks fail: the error that the others follow from, short, and where the rest is."""

from pathlib import Path

import pytest

from data_scoring.corpus.corpus import Corpus
from flows.run.errors import RanksFailedError
from tests.conftest import Ranks
from tests.flows.launch.failing_job import FailingJob
from trainer.job import Job


def failing(ranks: Ranks, way: str, data: int = 1) -> FailingJob:
    job = ranks.job("failing", (1, 1, data))
    return FailingJob(**{name: getattr(job, name) for name in Job.model_fields}, way=way)


@pytest.fixture
def under_torchrun(tiny_corpus: Corpus, tmp_path: Path) -> Ranks:
    """Ranks as users have them: torchrun records that one was killed."""
    return Ranks(tiny_corpus, tmp_path)


def log_of(ranks: Ranks, name: str) -> Path:
    return ranks.folder / "logs" / f"{name}.log"


def test_a_killed_rank_is_the_cause_of_what_the_others_say(under_torchrun: Ranks) -> None:
    ranks = under_torchrun
    with pytest.raises(RanksFailedError) as raised:
        ranks.launch(failing(ranks, "SIGKILL", data=2), "killed")
    assert str(raised.value) == (
        "rank 1 was killed by SIGKILL (out of memory?); the same command resumes from the last checkpoint "
        f"(log: {log_of(ranks, 'killed')})"
    )


def test_what_the_user_can_mend_is_said_in_the_rank_s_own_words(ranks: Ranks) -> None:
    with pytest.raises(ValueError, match="lower it") as raised:
        ranks.launch(failing(ranks, "ValueError"), "mistaken")
    assert str(raised.value) == f"train.lr: too high; lower it (log: {log_of(ranks, 'mistaken')})"


def test_of_a_traceback_the_innermost_calls_are_seen(under_torchrun: Ranks) -> None:
    ranks = under_torchrun
    with pytest.raises(RanksFailedError) as raised:
        ranks.launch(failing(ranks, "RuntimeError"), "broken")
    first, *calls = str(raised.value).splitlines()
    log = log_of(ranks, "broken")
    assert first == f"rank 0: RuntimeError: no kernel (log: {log})"
    assert len(calls) == 4
    assert calls[-1].endswith(" in _go_wrong") and "tests/flows/launch/failing_job.py:" in calls[-1]
    assert any(line.startswith("[rank 0]: ") and "Traceback" in line for line in log.read_text().splitlines())
