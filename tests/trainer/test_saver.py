"""Writer processes of a rank's checkpoint files: killing one raises an error instead of hanging."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.forked_ranks import run_ranks
from trainer.checkpoint_folder import complete_checkpoint


def write_two(_: int, folder: Path, fault: str) -> None:
    """Write files a and b, of which b may fail, and leave beside `folder` what is said of them."""
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageWriterTransforms
    from torch.distributed.checkpoint.metadata import MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

    from trainer import saver

    def bucket(name: str) -> Any:
        item = WriteItem(MetadataIndex(name), WriteItemType.TENSOR)  # type: ignore[call-arg]
        return str(folder / name), name, ([], [(item, torch.arange(1000))])

    write_measured = saver.writing_measured

    def faulty(path: Any, mode: str) -> Any:
        if str(path).endswith("b"):
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(28, "No space left on device")
        return write_measured(path, mode)

    if fault != "none":
        saver.writing_measured = faulty
    results = saver._Results()
    saver._write([_StorageWriterTransforms()], 0, [bucket("a"), bucket("b")], results)
    found = results.get_nowait()
    if isinstance(found, Exception):
        said = f"{type(found).__name__}: {found}"
    else:
        said = str({number: [result.size_in_bytes for result in part] for number, part in found.items()})
    folder.with_name("said").write_text(said)


def write(folder: Path, fault: str) -> str:
    folder.mkdir()
    run_ranks(write_two, folder, fault, num_ranks=1)
    return folder.with_name("said").read_text()


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("killed", "RuntimeError: the process that wrote b was ended by SIGKILL (memory?)"),
        ("full", "OSError: [Errno 28] No space left on device"),
    ],
)
def test_a_process_that_does_not_write_its_file_is_reported(fault: str, found: str, tmp_path: Path) -> None:
    assert write(tmp_path / "files", fault) == found


def test_files_are_written_and_measured(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    sizes = eval(write(folder, "none"))
    assert {number: sum(part) for number, part in sizes.items()} == {
        number: (folder / name).stat().st_size for number, name in enumerate("ab")
    }
    complete_checkpoint(folder, tmp_path / "step-00000001", {}, 1, ["a", "b"])


def test_a_file_that_another_host_wrote_elsewhere_is_missed(tmp_path: Path) -> None:
    (tmp_path / "here").write_text("")
    with pytest.raises(
        ValueError, match=r"__3_0.distcp: written by a rank, but missing .*; put the run's folder on a disk"
    ):
        complete_checkpoint(tmp_path, tmp_path / "step-00000001", {}, 1, ["__3_0.distcp"])
