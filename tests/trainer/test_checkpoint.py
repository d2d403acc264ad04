"""Checkpoints: intact or refused, saved on a stop request, and identical whether saved synchronously or not."""

import json
import pickle
import shutil
import threading
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import trainer.checkpoint_folder
from benchmarks.plain_model import read_checkpoint
from data_scoring.refine.training_mix import write_mix
from flows.run.errors import RanksFailedError
from tests.conftest import TINY_CHECKPOINT, TINY_TRAIN, Ranks, read_rows
from trainer.checkpoint_folder import (
    RECORD,
    complete_checkpoint,
    find_damage,
    list_checkpoints,
    read_checkpoint_record,
    seal_checkpoint,
)
from trainer.config import CheckpointConfig
from trainer.pickles import check_pickles

# A validation after every step makes a stop come where one is due, whenever it comes.
TRAIN = TINY_TRAIN.model_copy(update={"validate_every_steps": 1})
LAYOUT = (2, 1, 1)


class Evil:
    """What calls `open` when it is unpickled, as any function could be called."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@pytest.fixture
def checkpoint(trained: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint."""
    return Path(shutil.copytree(list_checkpoints(trained / "checkpoint")[-1], tmp_path / "step-00000001"))


@pytest.fixture
def created(tmp_path: Path) -> Path:
    """What a pickle creates where it is not refused."""
    return tmp_path / "created"


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def poison_metadata(checkpoint: Path, created: Path) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Evil(created)))


def poison_common(checkpoint: Path, created: Path) -> None:
    torch.save({"scheduler": Evil(created)}, checkpoint / "common.pt")


def poison_bytes(checkpoint: Path, created: Path) -> None:
    """Append an object to a file of tensors and say that all objects lie there."""
    content = BytesIO()
    torch.save([Evil(created)], content)
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    whole = (checkpoint / "__0_0.distcp").read_bytes()
    for index, entry in metadata.storage_data.items():
        if "_extra_state" in index.fqn:
            entry.relative_path, entry.offset, entry.length = "__0_0.distcp", len(whole), len(content.getvalue())
    (checkpoint / "__0_0.distcp").write_bytes(whole + content.getvalue())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(("poison", "name"), [(poison_metadata, ".metadata"), (poison_common, "common.pt")])
def test_a_pickle_that_would_run_code_is_refused(
    poison: Callable[[Path, Path], None], name: str, checkpoint: Path, created: Path
) -> None:
    check_pickles(checkpoint)
    poison(checkpoint, created)
    for read in (check_pickles, read_checkpoint):
        with pytest.raises(
            ValueError, match=rf"^{checkpoint / name}: refused, because loading it would call io.open; .*"
        ):
            read(checkpoint)
    assert not created.exists()


@pytest.mark.parametrize(("poison", "name"), [(poison_metadata, "/.metadata"), (poison_bytes, "")])
def test_ranks_run_no_code_of_a_checkpoint(
    poison: Callable[[Path, Path], None], name: str, trained: Path, created: Path, ranks: Ranks
) -> None:
    """Training goes on from all of it; who wants the weights alone reads no objects at all."""
    folder = Path(shutil.copytree(trained, ranks.folder / poison.__name__))
    [checkpoint] = list_checkpoints(folder / "checkpoint")
    poison(checkpoint, created)
    seal_checkpoint(checkpoint, read_checkpoint_record(checkpoint))
    with pytest.raises(ValueError) as error:
        ranks.train(folder.name)
    assert str(error.value).startswith(f"{checkpoint}{name}: refused, because loading it would call io.open; it w")
    assert "\n" not in str(error.value)
    assert not created.exists()


def test_any_change_of_any_file_is_found(checkpoint: Path) -> None:
    names = {path.name for path in checkpoint.iterdir()} - {RECORD}
    assert set(read_checkpoint_record(checkpoint)["files"]) == names
    assert find_damage(checkpoint) is None
    for name in sorted(names):
        whole = (checkpoint / name).read_bytes()
        flip_a_byte(checkpoint / name)
        assert find_damage(checkpoint) == f"{name} differs from what was written"
        found = [find_damage(checkpoint, part, parts=3) for part in range(3)]
        assert [part for part in found if part] == [f"{name} differs from what was written"]
        (checkpoint / name).unlink()
        assert find_damage(checkpoint) == f"{name} is missing"
        (checkpoint / name).write_bytes(whole)
    record = (checkpoint / RECORD).read_text()
    for text, damage in (
        ("{", "is damaged"),
        (record.replace('"step": ', '"step": 1'), "is damaged"),
        ('{"files": {"a": 1}}', "has no checksums, as in version 0.1"),
        ('{"files": {}}', f"does not list {min(names)}"),
    ):
        (checkpoint / RECORD).write_text(text)
        assert find_damage(checkpoint) == f"{RECORD} {damage}"


def test_what_the_disk_does_not_return_replaces_no_older_checkpoint(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose_a_bit(path: Path) -> None:
        if path.name == "__0_1.distcp":
            flip_a_byte(path)

    temporary = Path(shutil.copytree(checkpoint, checkpoint.with_name(".step-00000002.tmp")))
    record = {"fingerprint": "f"}
    with monkeypatch.context() as patch:
        patch.setattr(trainer.checkpoint_folder, "_drop_from_cache", lose_a_bit)
        with pytest.raises(ValueError, match=r"__0_1.distcp: the disk does not return what was written to it; .*"):
            complete_checkpoint(temporary, checkpoint.with_name("step-00000002"), record, keep_last=1)
    assert list_checkpoints(checkpoint.parent) == [checkpoint]
    assert find_damage(checkpoint) is None
    complete_checkpoint(temporary, checkpoint.with_name("step-00000002"), record, keep_last=1)
    assert [path.name for path in list_checkpoints(checkpoint.parent)] == ["step-00000002"]


def short_mix(path: Path, ranks: Ranks) -> int:
    return write_mix(path, f"select shard, sample from '{ranks.corpus.samples_path}' where sample < 42", 0, 1)


def train(ranks: Ranks, name: str, checkpoint: CheckpointConfig = TINY_CHECKPOINT) -> Path:
    return ranks.train(name, LAYOUT, make_mix=lambda path: short_mix(path, ranks), checkpoint=checkpoint, train=TRAIN)


def stop_training(ranks: Ranks, name: str, checkpoint: CheckpointConfig, is_time: Callable[[], bool]) -> Path:
    """Train in the folder `name`, tell torchrun to end once `is_time`, and return the folder."""

    def stop() -> None:
        while not is_time():
            time.sleep(0.02)
        [torchrun] = [child for child in psutil.Process().children() if "trainer.agent" in " ".join(child.cmdline())]
        torchrun.terminate()

    (ranks.folder / "progress.json").unlink(missing_ok=True)
    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    with pytest.raises(RanksFailedError, match="without recording an error"):
        train(Ranks(ranks.corpus, ranks.folder), name, checkpoint)
    thread.join()
    return ranks.folder / name


def checkpoint_steps(folder: Path) -> list[int]:
    return [read_checkpoint_record(path)["step"] for path in list_checkpoints(folder / "checkpoint")]


def last_second(folder: Path) -> float:
    return float(read_rows(folder / "steps.parquet", "step", "seconds")[-1][1])


def test_a_run_that_is_stopped_twice_and_loses_a_checkpoint_equals_an_unbroken_one(ranks: Ranks) -> None:
    unbroken = train(ranks, "unbroken")
    background = CheckpointConfig(every_minutes=1000, every_steps=2, keep_last=100, asynchronous="always")
    first = ranks.folder / "stopped" / "checkpoint" / "step-00000002"
    folder = stop_training(ranks, "stopped", background, first.exists)
    spent = [last_second(folder)]
    *regular, last = checkpoint_steps(folder)
    assert regular == list(range(2, last, 2))
    # The newest is damaged: training goes on from the one before, which was written while training went on.
    newest = list_checkpoints(folder / "checkpoint")[-1]
    flip_a_byte(newest / "__1_0.distcp")
    stop_training(ranks, "stopped", CheckpointConfig(keep_last=100), (ranks.folder / "progress.json").exists)
    assert f"{newest}: damaged (__1_0.distcp differs from what was written); set aside as damaged-{newest.name}\n" in (
        ranks.folder / "logs" / "stopped.log"
    ).read_text(errors="replace")
    *before, last = checkpoint_steps(folder)
    assert before == regular
    assert last < len(read_rows(unbroken / "steps.parquet", "step"))
    # The seconds of the steps that were lost count.
    spent.append(last_second(folder) - spent[0])
    assert spent[1] > 0
    # A killed attempt would have lost these seconds with its steps.
    note = folder / "training-time.json"
    note.write_text(json.dumps({"identity": "f", "seconds": last_second(folder) + 100}))
    spent.append(100.0)
    train(ranks, "stopped")
    for file, columns in (
        ("steps.parquet", ("step", "loss", "lr", "grad_norm", "num_samples", "num_tokens")),
        ("seen", ("step", "shard", "sample", "loss")),
        ("validation.parquet", ("step", "source", "loss", "num_tokens")),
        ("validation-samples.parquet", ("sample", "source", "num_tokens", "loss")),
    ):
        assert read_rows(folder / file, *columns) == read_rows(unbroken / file, *columns)
    seconds = [row[1] for row in read_rows(folder / "steps.parquet", "step", "seconds")]
    assert seconds == sorted(set(seconds))
    # All attempts count, and so does what a killed one noted.
    assert seconds[-1] >= sum(spent)
    assert not [*folder.glob("*.json*")]
    [found], [expected] = (list((place / "checkpoint").iterdir()) for place in (folder, unbroken))
    weights = read_checkpoint(expected)
    assert weights.keys() == (found_weights := read_checkpoint(found)).keys()
    assert all(torch.equal(found_weights[name], weights[name]) for name in weights)
