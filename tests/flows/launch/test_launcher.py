"""What is said when ranks fail: the first one's own error, short, and where the rest is."""

import json
import shutil
from pathlib import Path

import pytest
from flows.stages.completion import launch_plan

from data_scoring.corpus.corpus import Corpus
from flows.launch.launcher import _raise_failure
from flows.launch.torchrun import rank_environment
from flows.run.config import parse_config
from flows.run.rank_errors import RanksFailedError
from tests.conftest import Ranks
from tests.flows.fakes import values
from trainer.checkpoint_folder import seconds_to_stop


def test_a_rank_s_own_traceback_is_what_is_seen(ranks: Ranks, trained: Path, tmp_path: Path) -> None:
    broken = Ranks(Corpus(Path(shutil.copytree(ranks.corpus.folder, tmp_path / "corpus"))), tmp_path)
    manifest = tmp_path / "corpus" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["shards"] = None
    manifest.write_text(json.dumps(content))
    with pytest.raises(RanksFailedError) as error:
        broken.train("broken")
    first, *calls = str(error.value).splitlines()
    log = tmp_path / "logs" / "broken.log"
    assert first.startswith("rank 0: TypeError: ")
    assert first.endswith(f"(log: {log})")
    assert len(calls) <= 4
    assert "data_scoring/corpus/corpus.py:" in calls[-1]
    assert any(line.startswith("[rank 0]: ") and "Traceback" in line for line in log.read_text().splitlines())


@pytest.mark.parametrize(
    ("exitcodes", "message"),
    [
        ([(1, -9)], "rank 1 was killed by SIGKILL (out of memory?); the same command goes on from the last checkpoint"),
        ([(0, 1)], "rank 0: RuntimeError: the other is gone"),
    ],
)
def test_a_killed_rank_is_the_cause_of_what_the_others_say(
    ranks: Ranks, tmp_path: Path, exitcodes: list[tuple[int, int]], message: str
) -> None:
    job = ranks.job("killed").model_copy(update={"errors": tmp_path})
    error = {"rank": 0, "time": 1.0, "kind": "RuntimeError", "is_user_error": False, "message": "the other is gone"}
    (tmp_path / "rank-00000.json").write_text(json.dumps({**error, "traceback": ""}))
    lines = [f"  rank      : {rank} (local_rank: {rank})\n  exitcode  : {code} (pid: 7)\n" for rank, code in exitcodes]
    (tmp_path / "log").write_text(
        "old Root Cause rank : 5 exitcode : -11\n" + "Root Cause (first observed):\n" + lines[0]
    )
    with pytest.raises(RanksFailedError) as raised:
        _raise_failure(job, "ended", tmp_path / "log", 0)
    assert str(raised.value).startswith(message)


def test_ranks_have_the_time_to_save_that_their_checkpoint_takes(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """995.6 M parameters of 14 bytes, four times at 400 MB a second, beside the 20 seconds that everybody has."""
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    assert seconds_to_stop(995_600_000 * 14) == pytest.approx(20 + 4 * 995.6 * 14 / 400)
    assert rank_environment(None, 89.69)["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "90"
    slurm = {"launch": {"kind": "slurm"}, "device": "cuda"}
    large = launch_plan(
        parse_config({**values(texts, tmp_path), **slurm, "model": {"preset": "pangu-pi-1b-pro"}}, "test")
    )
    assert "#SBATCH --signal=TERM@160\n" in large
    assert "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=160\n" in large
    small = launch_plan(parse_config({**values(texts, tmp_path), **slurm}, "test"))
    assert "--signal" not in small
    assert "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=21\n" in small
