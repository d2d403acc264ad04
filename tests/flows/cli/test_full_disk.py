"""A disk that is full, with a little more room each time: one line says so, and nothing that was complete is lost."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flows.cli.test_random_kills import COMMANDS, CONFIG, Folder
from tests.flows.equal_runs import assert_equal_runs


class SmallDisk:
    """A file system in memory, whose size is set."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.kilobytes = folder, 100
        folder.mkdir(parents=True)
        self._mount("-t", "tmpfs", "-o", f"size={self.kilobytes}k", "tmpfs", str(folder))

    def grow(self, kilobytes: int) -> None:
        self._resize(self.kilobytes + kilobytes)

    def shrink(self) -> None:
        """Leave almost no room beside what is there."""
        self._resize(shutil.disk_usage(self.folder).used // 1024 + 8)

    def _resize(self, kilobytes: int) -> None:
        self.kilobytes = kilobytes
        self._mount("-o", f"remount,size={kilobytes}k", str(self.folder))

    @staticmethod
    def _mount(*arguments: str) -> None:
        subprocess.run(["mount", *arguments], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    folder = tmp_path / "full" / "runs"
    try:
        yield SmallDisk(folder)
    except subprocess.CalledProcessError:
        pytest.skip("needs the right to mount a file system")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)


@pytest.mark.slow
def test_every_stage_on_a_disk_that_grows(tmp_path: Path, disk: SmallDisk) -> None:
    unbroken = Folder(tmp_path / "unbroken", CONFIG)
    for command in COMMANDS:
        process = unbroken.start(command)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output.decode()
    folder, failures = Folder(tmp_path / "full", CONFIG), dict.fromkeys(COMMANDS, 0)
    for command in COMMANDS:
        disk.shrink()
        while True:
            process = folder.start(command)
            output, _ = process.communicate(timeout=300)
            if process.returncode == 0:
                break
            failures[command] += 1
            said = output.decode()
            lines = [line for line in said.splitlines() if line.startswith("error: ")]
            assert len(lines) == 1 and "No space left on device; free some space" in lines[0], (disk.kilobytes, said)
            assert "Traceback" not in said, (disk.kilobytes, said)
            if (folder.run / "run.yaml").exists():
                found = subprocess.run(
                    [*process.args[:3], "verify", str(folder.run)], capture_output=True, text=True, check=False
                )
                assert found.returncode == 0, (disk.kilobytes, found.stdout)
            # Training reserves room for its ranks' errors and writes checkpoints; the others write little.
            disk.grow(95 if command.startswith("train") else 24)
    assert sum(failures.values()) >= 20 and min(failures.values()) > 0, failures
    assert_equal_runs(folder.run, unbroken.run)
    print(f"{sum(failures.values())} full disks: {failures}")
