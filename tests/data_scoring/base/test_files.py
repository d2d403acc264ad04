"""Files and folders that are never half-written."""

import errno
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
