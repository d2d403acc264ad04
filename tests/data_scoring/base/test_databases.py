"""Databases of views: other programs read them, write to them, or are killed."""

import logging
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest

from data_scoring.base.databases import replacing_views
from tests.data_scoring.base.test_sql import ODD

HOLDER = """
import sys, time, duckdb
connection = duckdb.connect(sys.argv[1])
connection.execute(sys.argv[2])
print("ready", flush=True)
time.sleep(600)
"""


def refresh(path: Path, number: int) -> None:
    with replacing_views(path) as connection:
        connection.execute(f"create view v as select {number} as x")
        connection.execute("comment on view v is 'A number.'")


def read(path: Path, sql: str = "from v") -> list[tuple[object, ...]]:
    with duckdb.connect(str(path), read_only=True) as connection:
        return connection.sql(sql).fetchall()


@pytest.mark.parametrize("name", ODD)
def test_a_folder_may_be_called_anything(name: str, tmp_path: Path) -> None:
    path = tmp_path / name / "views.duckdb"
    for number in (1, 2):
        refresh(path, number)
        assert read(path) == [(number,)]
    assert [file.name for file in path.parent.iterdir() if file.name != ".views.lock"] == ["views.duckdb"]


def test_older_versions_of_duckdb_can_read_it(tmp_path: Path) -> None:
    refresh(tmp_path / "views.duckdb", 1)
    # The version of the format is in the file's first block: 64 is what DuckDB 1.0 writes.
    assert int.from_bytes((tmp_path / "views.duckdb").read_bytes()[12:20], "little") == 64


def test_readers_keep_what_they_have_opened(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "views.duckdb"
    refresh(path, 1)
    process = hold(path, "select 1")
    refresh(path, 2)
    assert read(path) == [(2,)]
    end(process)
    refresh(path, 3)
    assert read(path) == [(3,)]
    assert caplog.records == []
    assert [file.name for file in tmp_path.iterdir() if file.name != ".views.lock"] == ["views.duckdb"]


def hold(path: Path, sql: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path), sql], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


@pytest.mark.parametrize("is_killed_first", [False, True])
def test_a_table_in_a_write_ahead_log_is_kept_and_bars_nobody(
    is_killed_first: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "views.duckdb"
    refresh(path, 1)
    process = hold(path, "create table mine as select 42 as a")
    assert (tmp_path / "views.duckdb.wal").exists()
    if is_killed_first:
        end(process)
    for number in (2, 3):
        refresh(path, number)
        assert read(path) == [(number,)]
    end(process)
    refresh(path, 4)
    assert read(path) == [(4,)]
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "its file is kept as views-1.duckdb" in record.getMessage()
    with duckdb.connect(str(tmp_path / "views-1.duckdb")) as connection:
        assert connection.sql("from mine").fetchall() == [(42,)]


@pytest.mark.parametrize("sql", ["create table mine as select 42 as a", "create view mine as select 42 as a"])
def test_what_somebody_created_is_kept(sql: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "views.duckdb"
    for number in (1, 2):
        refresh(path, number)
        with duckdb.connect(str(path)) as connection:
            connection.execute(sql)
    refresh(path, 3)
    assert read(path) == [(3,)]
    assert [read(tmp_path / f"views-{number}.duckdb", "from mine") for number in (1, 2)] == [[(42,)], [(42,)]]
    assert len(caplog.records) == 2


def test_a_log_without_its_database_and_damage_bar_nobody(tmp_path: Path) -> None:
    path, log = tmp_path / "views.duckdb", tmp_path / "views.duckdb.wal"
    refresh(path, 1)
    log.write_bytes(b"of another database")
    path.unlink()
    refresh(path, 2)
    assert read(path) == [(2,)]
    path.write_bytes(b"damaged")
    refresh(path, 3)
    assert read(path) == [(3,)]


def test_nothing_is_replaced_if_the_views_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "views.duckdb"
    refresh(path, 1)
    with pytest.raises(duckdb.CatalogException), replacing_views(path) as connection:
        connection.execute("create view v as from nothing")
    assert read(path) == [(1,)]
    assert [file.name for file in tmp_path.iterdir() if file.name != ".views.lock"] == ["views.duckdb"]
