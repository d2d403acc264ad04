"""Writer processes of a rank's checkpoint files: killing one raises an error instead of hanging."""

import subprocess
import sys
from pathlib import Path

import pytest

from trainer.checkpoint_folder import complete_checkpoint

SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
from trainer.devices import initialise
initialise("cpu", 0)
from torch.distributed.checkpoint.filesystem import _StorageWriterTransforms
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from trainer import saver

def bucket(name):
    item = WriteItem(MetadataIndex(name), WriteItemType.TENSOR)
    return str(folder / name), name, ([], [(item, torch.arange(1000))])

folder, fault = Path(sys.argv[1]), sys.argv[2]
write = saver.writing_measured
def faulty(path, mode):
    if path.endswith("b"):
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(28, "No space left on device")
    return write(path, mode)
if fault != "none":
    saver.writing_measured = faulty
results = saver._Results()
saver._write([_StorageWriterTransforms()], 0, [bucket("a"), bucket("b")], results)
found = results.get_nowait()
if isinstance(found, Exception):
    print(f"{type(found).__name__}: {found}")
else:
    print({number: [result.size_in_bytes for result in part] for number, part in found.items()})
"""


def write(folder: Path, fault: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(folder), fault]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.strip()


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("killed", "RuntimeError: the process that wrote b was ended by SIGKILL (memory?)"),
        ("full", "OSError: [Errno 28] No space left on device"),
    ],
)
def test_a_process_that_does_not_write_its_file_is_reported(fault: str, found: str, tmp_path: Path) -> None:
    assert write(tmp_path, fault) == found


def test_files_are_written_and_measured(tmp_path: Path) -> None:
    sizes = eval(write(tmp_path, "none"))
    assert {number: sum(part) for number, part in sizes.items()} == {
        number: (tmp_path / name).stat().st_size for number, name in enumerate("ab")
    }
    complete_checkpoint(tmp_path, tmp_path.with_name("step-00000001"), {}, 1, ["a", "b"])


def test_a_file_that_another_host_wrote_elsewhere_is_missed(tmp_path: Path) -> None:
    (tmp_path / "here").write_text("")
    with pytest.raises(
        ValueError, match=r"__3_0.distcp: written by a rank, but missing .*; put the run's folder on a disk"
    ):
        complete_checkpoint(tmp_path, tmp_path / "step-00000001", {}, 1, ["__3_0.distcp"])
