"""Temporary folders of processes that are killed, and of those that are not."""

import errno
import fcntl
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

import pytest

from data_scoring.base.temporary_folders import temporary_folder

HOLD = """
import sys
from data_scoring.base.temporary_folders import temporary_folder

with temporary_folder() as folder:
    (folder / "large").touch()
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def test_what_a_killed_process_left_is_deleted_and_nothing_else(place: Path) -> None:
    holders = [
        subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        killed, used = (Path(holder.stdout.readline().strip()) for holder in holders if holder.stdout)
        holders[0].kill()
        holders[0].wait()
        assert (killed / "large").exists()
        # Another program's, and a link to a folder that looks like one.
        (place / "reprise-other").mkdir()
        (place / "mine").mkdir()
        (place / "mine" / ".reprise-in-use").touch()
        (place / "reprise-link").symlink_to(place / "mine")
        with temporary_folder() as folder:
            assert folder.parent == place
            assert {path.name for path in place.iterdir()} == {
                folder.name, used.name, "reprise-other", "reprise-link", "mine",
            }  # fmt: skip
            assert (used / "large").exists()
        assert not folder.exists()
        assert (place / "mine" / ".reprise-in-use").exists()
        holders[1].communicate("")
        assert holders[1].returncode == 0
        assert not used.exists()
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()


def test_a_file_system_without_locks_has_temporary_folders(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> NoReturn:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with temporary_folder() as first:
        (first / "content").touch()
        with temporary_folder() as second:
            assert second != first
        assert (first / "content").exists()
    assert list(place.iterdir()) == []
