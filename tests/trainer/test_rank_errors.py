"""Of the errors that ranks leave, the one that the others follow from."""

import json
import signal
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from trainer.agent import killed_rank
from trainer.rank_errors import RankError, killed, leave_error, release_space, reserve_space, root_cause


def raised(rank: int, time: float, is_user_error: bool = False) -> RankError:
    return RankError(rank, time, "RuntimeError", is_user_error, "what it says", "Traceback")


@pytest.mark.parametrize(
    ("errors", "rank"),
    [
        pytest.param([], None, id="none"),
        pytest.param([raised(0, 2.0), raised(1, 1.0)], 1, id="the earliest"),
        pytest.param([raised(0, 1.0), killed(1, signal.SIGKILL, 2.0)], 1, id="killed, noticed later"),
        pytest.param([raised(0, 1.0), killed(1, signal.SIGABRT, 2.0)], 0, id="aborted after another's error"),
        pytest.param(
            [raised(0, 2.0, is_user_error=True), killed(1, signal.SIGKILL, 1.0)], 0, id="the user can mend it"
        ),
    ],
)
def test_the_cause_comes_before_its_consequences(tmp_path: Path, errors: list[RankError], rank: int | None) -> None:
    for error in errors:
        leave_error(tmp_path, error)
    found = root_cause(tmp_path)
    assert (None if found is None else found.rank) == rank
    assert found is None or found in errors


def test_an_error_needs_no_space_that_is_not_reserved(tmp_path: Path) -> None:
    """It is written into the file that was reserved, whatever its text takes, and no file of it is left."""
    reserve_space(tmp_path, 3)
    [reserved] = tmp_path.iterdir()
    inode, blocks = reserved.stat().st_ino, reserved.stat().st_blocks
    leave_error(tmp_path, RankError(3, 1.0, "OSError", True, "\x00" * 10**6, "é" * 10**6))
    [left] = tmp_path.iterdir()
    assert (left.name, left.stat().st_ino) == ("rank-00003.json", inode)
    assert left.stat().st_blocks <= blocks
    found = root_cause(tmp_path)
    assert found is not None and found.message.strip("\x00") == "" and len(found.message) > 1000
    reserve_space(tmp_path, 4)
    release_space(tmp_path)
    assert list(tmp_path.iterdir()) == [left]


def test_an_error_that_0_7_left_is_read(tmp_path: Path) -> None:
    content = {"rank": 1, "time": 2.0, "kind": "ValueError", "is_users": True, "message": "lower it", "traceback": "T"}
    (tmp_path / "rank-00001.json").write_text(json.dumps(content))
    assert root_cause(tmp_path) == RankError(1, 2.0, "ValueError", True, "lower it", "T")


def test_only_what_takes_memory_away_is_said_to() -> None:
    assert killed(3, signal.SIGKILL, 0.0).message == "rank 3 was killed by SIGKILL (out of memory?)"
    assert killed(3, signal.SIGSEGV, 0.0).message == "rank 3 was killed by SIGSEGV"


@pytest.mark.parametrize(
    ("failures", "rank"),
    [
        pytest.param([(0, 1, 10), (1, -9, 10)], 1, id="another reports at once that it lost it"),
        pytest.param([(0, -15, 11), (1, -9, 10)], 1, id="torchrun ended the other"),
        pytest.param([(0, 1, 10), (1, -9, 40)], None, id="torchrun killed it in the end"),
        pytest.param([(0, 1, 10), (1, -15, 10)], None, id="no rank was killed"),
        pytest.param([(0, -6, 10), (1, -15, 10)], 0, id="aborted"),
    ],
)
def test_the_agent_tells_a_killed_rank_from_one_that_it_ended(
    failures: list[tuple[int, int, int]], rank: int | None
) -> None:
    found = {}
    for number, code, time in failures:
        found[number] = ProcessFailure(local_rank=number, pid=7, exitcode=code, error_file="")
        found[number].timestamp = time
    answer = killed_rank(ChildFailedError("worker", found))
    assert (None if answer is None else answer[0]) == rank
