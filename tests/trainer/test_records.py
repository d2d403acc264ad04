"""What training recorded until its checkpoint is there when training resumes, or it does not resume."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_scoring.base.parquet import parquet_fingerprint, write_parquet
from tests.conftest import Ranks, read_rows
from trainer.checkpoint_folder import RECORD, list_checkpoints, read_checkpoint_record, seal_checkpoint


def flip_a_byte(path: Path) -> None:
    """Flip the last byte of the values of the last column, since not every byte of a file has an effect on them."""
    content, group = bytearray(path.read_bytes()), pq.read_metadata(path).row_group(0)
    column = group.column(group.num_columns - 1)
    content[(column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 1] ^= 1
    path.write_bytes(content)


def drop_the_last_row(path: Path) -> None:
    table = pq.read_table(path)
    write_parquet(path, table.slice(0, len(table) - 1), parquet_fingerprint(path) or "")


@pytest.mark.parametrize("damage", [flip_a_byte, drop_the_last_row, Path.unlink])
@pytest.mark.parametrize("name", ["steps.parquet", "validation.parquet", "seen/step=00000001-replica=0000.parquet"])
def test_training_does_not_resume_without_its_records(
    name: str, damage: Callable[[Path], None], ranks: Ranks, trained: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(trained, ranks.folder / tmp_path.name))
    damage(folder / name)
    with pytest.raises(ValueError, match=f"{name.split('=', maxsplit=1)[0]}.*: damaged or missing") as error:
        ranks.train(folder.name)
    assert "\n" not in str(error.value)
    assert list_checkpoints(folder / "checkpoint") != []


def test_a_checkpoint_of_other_training_is_not_deleted(ranks: Ranks, trained: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained, ranks.folder / tmp_path.name))
    [checkpoint] = list_checkpoints(folder / "checkpoint")
    seal_checkpoint(checkpoint, {**read_checkpoint_record(checkpoint), "fingerprint": "another"})
    with pytest.raises(ValueError, match="was trained with another configuration, corpus, mix or initial checkpoint; "):
        ranks.train(folder.name)
    assert list_checkpoints(folder / "checkpoint") == [checkpoint]
    # One that has lost its record is kept, too.
    (checkpoint / RECORD).unlink()
    for file in ("steps.parquet", "validation.parquet"):
        (folder / file).unlink()
    ranks.train(folder.name)
    assert json.loads((list_checkpoints(folder / "checkpoint")[-1] / RECORD).read_text())["step"] > 0


def test_validation_samples_average_to_the_last_validation(trained: Path) -> None:
    rows = read_rows(trained / "validation-samples.parquet", "sample", "source", "num_tokens", "loss")
    assert [row[0] for row in rows] == list(range(len(rows)))
    validation = read_rows(trained / "validation.parquet", "step", "source", "num_tokens", "loss")
    last = [row[1:] for row in validation if row[0] == max(row[0] for row in validation)]
    for source, num_tokens, loss in last:
        mine = [row[2:] for row in rows if row[1] == source]
        assert sum(tokens for tokens, _ in mine) == num_tokens
        assert sum(tokens * each for tokens, each in mine) / num_tokens == pytest.approx(loss, abs=1e-6)
    assert sum(num_tokens for _, num_tokens, _ in last) == sum(row[2] for row in rows)
