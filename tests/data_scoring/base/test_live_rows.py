"""All rows of a growing Parquet file can be read at any time, each once."""

from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from data_scoring.base.live_rows import live_path, read_live_rows
from data_scoring.base.parquet import read_parquet
from trainer.records import STEPS, RowLog, training_seconds

SCHEMA = pa.schema([("step", pa.int32()), ("loss", pa.float32()), ("ended_at", pa.timestamp("us"))])


def row(step: int, loss: float = 0.1) -> dict[str, Any]:
    return {"step": step, "loss": loss, "ended_at": datetime(2026, 1, 2, 3, 4, 5, step)}


def read(path: Path) -> list[int]:
    return [each["step"] for each in read_live_rows(path)[1]]


def test_every_row_is_there_once_with_the_file_s_own_numbers(tmp_path: Path) -> None:
    path = tmp_path / "steps.parquet"
    assert read_live_rows(path) == (None, [])
    log = RowLog(path, SCHEMA, "f", 0)
    for step in (1, 2, 3):
        log.append(row(step))
        assert read(path) == [*range(1, step + 1)]
    live = read_live_rows(path)
    log.flush()
    assert not live_path(path).exists()
    # 0.1 is no number of single precision.
    assert live == read_live_rows(path) == ("f", read_parquet(path).to_pylist())
    assert live[1][0]["loss"] != 0.1
    log.append(row(4))
    assert read(path) == [1, 2, 3, 4]
    # A line that is being written.
    with live_path(path).open("a") as file:
        file.write('{"step": 5, "lo')
    assert read(path) == [1, 2, 3, 4]


def test_steps_that_are_repeated_after_a_kill_occur_once(tmp_path: Path) -> None:
    path = tmp_path / "steps.parquet"
    log = RowLog(path, SCHEMA, "f", 0)
    for step in (1, 2, 3, 4):
        log.append(row(step))
    digest = log.flush()
    log.append(row(5))
    # Killed here; the checkpoint of step 4 is damaged, and training resumes from the one of step 2.
    log = RowLog(path, SCHEMA, "f", 2)
    assert read(path) == [1, 2, 3, 4]
    log.append(row(3, 7.0))
    assert read(path) == [1, 2, 3]
    log.append(row(4, 8.0))
    assert log.flush() != digest
    assert [each["loss"] for each in read_live_rows(path)[1]] == [pytest.approx(0.1)] * 2 + [7.0, 8.0]


def test_rows_of_other_training_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "steps.parquet"
    log = RowLog(path, SCHEMA, "old", 0)
    log.append(row(1))
    log.flush()
    log = RowLog(path, SCHEMA, "new", 0)
    assert read_live_rows(path)[0] == "old"
    log.append(row(1, 9.0))
    fingerprint, rows = read_live_rows(path)
    assert (fingerprint, [each["loss"] for each in rows]) == ("new", [9.0])


def test_training_goes_on_from_a_file_without_the_newer_columns(tmp_path: Path) -> None:
    path, names = tmp_path / "steps.parquet", ("seconds", "ended_at")
    older = pa.schema([field for field in STEPS if field.name not in names])
    values = {"loss": 2.0, "lr": 0.1, "grad_norm": 1.0, "num_samples": 2, "num_tokens": 9, "tokens_per_second": 3.0}
    log = RowLog(path, older, "f", 0)
    log.append({"step": 1, **values})
    digest = log.flush()
    # The digest is of the columns that there were.
    log = RowLog(path, STEPS, "f", 1, digest)
    # 9 tokens at 3 per second.
    assert training_seconds(log.written) == 3.0
    log.append({"step": 2, **values, "seconds": 4.5, "ended_at": datetime(2026, 1, 2)})
    digest = log.flush()
    assert training_seconds(log.written) == 4.5
    assert training_seconds(STEPS.empty_table()) == 0.0
    rows = read_parquet(path).to_pylist()
    assert [[each[name] for name in names] for each in rows] == [[None, None], [4.5, datetime(2026, 1, 2)]]
    RowLog(path, STEPS, "f", 2, digest)


@pytest.mark.parametrize("skip", range(5))
def test_rows_that_are_known_can_be_skipped(tmp_path: Path, skip: int) -> None:
    path = tmp_path / "steps.parquet"
    log = RowLog(path, SCHEMA, "f", 0)
    for step in (1, 2):
        log.append(row(step))
    log.flush()
    log.append(row(3))
    assert read_live_rows(path, skip)[1] == read_live_rows(path)[1][skip:]
