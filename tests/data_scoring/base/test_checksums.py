"""Verifying files: here, or, if there is much to read, by an engine of other hosts; either way once a version."""

from collections.abc import Callable
from pathlib import Path

import pytest

from data_scoring.base import checksums
from data_scoring.base.checksums import FileVerifier, WrittenFile
from data_scoring.base.engine import LocalEngine
from data_scoring.base.files import checksum
from data_scoring.base.progress import silent


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[Path, WrittenFile]:
    # A file that was just written may change again within a tick of the clock, and is read again.
    monkeypatch.setattr(checksums, "_TICK_NS", -1)
    paths = [tmp_path / f"{number}.bin" for number in range(5)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 1000)
    return {path: WrittenFile(checksum(path), 1000) for path in paths}


@pytest.mark.parametrize("most", [0, 1 << 40])
def test_damage_is_found_and_files_are_read_once(
    files: dict[Path, WrittenFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(checksums, "_MANY_BYTES", most)
    opened: list[int] = []

    def open_engine() -> LocalEngine:
        opened.append(1)
        return LocalEngine(1)

    def verify(open_engine: Callable[[], LocalEngine] | None = open_engine) -> dict[Path, str]:
        return FileVerifier(tmp_path / "verified.json").find_damage(files, silent, open_engine)

    assert verify() == {}
    assert len(opened) == (1 if most == 0 else 0)
    damaged = tmp_path / "3.bin"
    damaged.write_bytes(b"\1" * 1000)
    (tmp_path / "4.bin").unlink()
    expected = {damaged: "its checksum differs", tmp_path / "4.bin": "it is missing"}
    assert verify() == expected
    assert verify(None) == expected
    # What is known is not read again, so nothing has to be opened for it.
    del files[damaged], files[tmp_path / "4.bin"]
    opened.clear()
    assert verify() == {} and not opened
