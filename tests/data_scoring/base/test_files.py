"""Files and folders that are never half-written."""

import errno
import re
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from data_scoring.base.files import making, writing


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "one" / "two" / "made"
    with pytest.raises(OSError, match="full") as caught, making(target) as folder:
        (folder / "part").write_text("some")
        raise OSError(errno.ENOSPC, "full", str(folder / "part"))
    # Nothing stays, parents neither, and the error says what was to be.
    assert (list(tmp_path.iterdir()), caught.value.filename) == ([], str(target / "part"))
    # What a killed process left is not in it.
    (target.parent / ".made.tmp").mkdir(parents=True)
    (target.parent / ".made.tmp" / "old").touch()
    with making(target) as folder:
        (folder / "part").write_text("all")
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")} == {
        "one", "one/two", "one/two/made", "one/two/made/part",
    }  # fmt: skip


def make_slowly(target: Path, content: str) -> str:
    """Make a folder of two parts; return what came of it."""
    try:
        with making(target) as folder:
            (folder / "first").write_text(content)
            time.sleep(0.002)
            (folder / "second").write_text(content)
    except ValueError as error:
        return str(error)
    return content


def test_one_process_at_a_time_makes_a_folder(tmp_path: Path) -> None:
    with ProcessPoolExecutor(4, get_context("fork")) as processes:
        for number in range(25):
            target = tmp_path / str(number)
            results = [*processes.map(make_slowly, [target] * 4, "abcd")]
            [made] = [result for result in results if len(result) == 1]
            assert [(target / part).read_text() for part in ("first", "second")] == [made, made]
            for refusal in {*results} - {made}:
                assert re.fullmatch(f"{target}: (being made by another process|already exists)(; .+)", refusal)
    # Neither locks nor temporary folders stay.
    assert {path.name for path in tmp_path.iterdir()} == {str(number) for number in range(25)}


def test_two_processes_of_the_same_id_write_the_same_file_at_the_same_time(tmp_path: Path) -> None:
    """As those of two hosts, or of two containers, may have."""
    path = tmp_path / "part.bin"
    with writing(path) as first:
        first.write_bytes(b"same")
        with writing(path) as second:
            second.write_bytes(b"same")
        assert path.read_bytes() == b"same"
    assert path.read_bytes() == b"same"
    assert [*tmp_path.iterdir()] == [path]
