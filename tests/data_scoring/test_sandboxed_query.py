"""What a query of the user may do: read the run's views and files, and nothing else."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest

from data_scoring.base.parquet import write_parquet
from data_scoring.ledger import DERIVED, VIEWS
from data_scoring.sandboxed_query import ask

ENDLESS = "select count(*) from range(1000000000) a, range(1000000000) b where a.range % 7 = b.range % 5"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run with one mix, beside a secret."""
    table = pa.table({"shard": pa.array([0, 0], pa.int32()), "sample": pa.array([1, 0], pa.int32())})
    write_parquet(tmp_path / "it's a run" / "rounds" / "1" / "mix.parquet", table, "f")
    (tmp_path / "it's a run" / "run.yaml").write_text("config: {}\n")
    (tmp_path / "secret.csv").write_text("a,b\n1,2\n")
    return tmp_path / "it's a run"


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("sql", "rows"),
    [
        ("select sample from mix order by place", [(1,), (0,)]),
        ("from mix select count(*)", [(2,)]),
        ("with x as (select * from mix) select count(*) from x;", [(2,)]),
        ("/* all */ values (1)", [(1,)]),
        ("select content from read_text('{run}/run.yaml')", [("config: {}\n",)]),
        ("pivot (select shard, sample from mix) on shard using sum(sample)", [(1,)]),
        ("select count(*) from (show tables)", [(len(VIEWS) + len(DERIVED),)]),
        ("select count(*) from (describe mix)", [(5,)]),
        ("from query('select 1')", [(1,)]),
        ("select 'copy; insert'", [("copy; insert",)]),
    ],
)
def test_the_runs_own_files_are_read(run: Path, sql: str, rows: list[tuple[object, ...]]) -> None:
    before = _files(run.parent)
    assert ask(run, sql.replace("{run}", str(run).replace("'", "''")), 60).fetchall() == rows
    # Not even the ledger is written: the folder may be read-only.
    assert _files(run.parent) == before


@pytest.mark.parametrize(
    "sql", ["show tables", "describe mix", "summarize mix", "explain from mix", "explain analyze from mix"]
)
def test_descriptions_are_queries(run: Path, sql: str) -> None:
    assert len(ask(run, sql, 60).fetchall()) > 0


@pytest.mark.parametrize(
    "sql",
    [
        "from read_text('/etc/passwd')",
        "from read_blob('{run}/../secret.csv')",
        "from read_csv('{outside}/secret.csv')",
        "from '{outside}/secret.csv'",
        "from '{outside}/secret.parquet'",
        "from read_json('{outside}/secret.csv')",
        "from sniff_csv('{outside}/secret.csv')",
        "from glob('{outside}/*')",
        "from read_duckdb('{outside}/x.db')",
        "from parquet_metadata('{outside}/x.parquet')",
        "from query('from read_text(''/etc/passwd'')')",
        "from json_execute_serialized_sql(json_serialize_sql('from read_text(''/etc/passwd'')'))",
        "from json_execute_serialized_sql(json_serialize_sql('select 1'))",
        "from 'https://example.org/x.csv'",
        "from 's3://bucket/x.parquet'",
        "select getenv('HOME')",
        "copy (select 1) to '{outside}/new.csv'",
        "copy (select 1) to '{run}/new.csv'",
        "copy (select 1 as shard, 2 as sample) to '{run}/rounds/1/mix.parquet' (format parquet)",
        "with x as (copy (select 1) to '{run}/new.csv') select 1",
        "with x as materialized (copy (select 1) to '{run}/new.csv') from x",
        "explain analyze copy (select 1) to '{run}/new.csv'",
        "explain analyze with x as (copy (select 1) to '{run}/new.csv') select 1",
        "EXPLAIN (analyze) copy (select 1) to '{run}/new.csv'",
        "explain /* */ analyze copy (select 1) to '{run}/new.csv'",
        "from query('with x as (copy (select 1) to ''{run}/new.csv'') select 1')",
        "from json_execute_serialized_sql(json_serialize_sql('with x as (copy (select 1) to ''new.csv'') select 1'))",
        "pivot (with x as (copy (select 1) to '{run}/new.csv') select 1 a, 2 b) on a using sum(b)",
        "export database '{run}/new'",
        "attach '{outside}/new.db'",
        "attach '{run}/new.db'",
        "install httpfs",
        "load httpfs",
        "create table x as select 1",
        "drop view mix",
        "insert into mix values (1)",
        "pragma enable_profiling",
        "call enable_logging()",
        "from enable_logging()",
        "set lock_configuration = false",
        "set enable_external_access = true",
        "set allowed_directories = ['/']",
        "reset enable_external_access",
        "set memory_limit = '100GB'",
        "use memory",
        "set variable x = 1",
        "prepare x as select 1",
        "begin",
        "checkpoint",
        "vacuum",
        "select 1; select 2",
        "select 1; copy (select 1) to '{run}/new.csv'",
        "",
        ";",
        "-- nothing",
        "select",
        "select nothing from nowhere",
        "select cast('x' as int)",
        "select \x00",
        "select " + "(" * 5000,
        "select " + "-" * 3 + "1" + "+1" * 20000,
        "select '" + "x" * 100000,
        "from VIEWS",
        "from run",
    ],
)  # fmt: skip
def test_everything_else_is_refused_in_one_line(run: Path, sql: str) -> None:
    before = _files(run.parent)
    names = {"{run}": str(run).replace("'", "''"), "{outside}": str(run.parent)}
    for name, value in names.items():
        sql = sql.replace(name, value)
    with pytest.raises(ValueError) as error:
        ask(run, sql, 60).fetchall()
    assert str(error.value).startswith("sql: ")
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 1000
    assert _files(run.parent) == before


@pytest.mark.parametrize("name", ["exp[1]", "a *b? {c,d}\n%", "it's [[x]"])
def test_the_folder_may_have_any_name(run: Path, name: str) -> None:
    moved = run.rename(run.with_name(name))
    assert ask(moved, "select count(*) from mix", 60).fetchall() == [(2,)]
    with pytest.raises(ValueError, match="Permission Error"):
        ask(moved, f"from '{run.parent}/secret.csv'", 60)


def test_unrestricted_queries_do_what_they_say(run: Path) -> None:
    secret, new = run.parent / "secret.csv", run.parent / "new.csv"
    assert ask(run, f"from '{secret}'", 60, is_restricted=False).fetchall() == [(1, 2)]
    assert ask(run, f"copy (from mix) to '{new}'; select 3", 60, is_restricted=False).fetchall() == [(3,)]
    assert new.exists()
    with pytest.raises(ValueError, match=r"^sql: the query returns no rows; write a select$"):
        ask(run, "", 60, is_restricted=False)


def test_a_query_ends_in_time(run: Path) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"^sql: not done after 0.5 s; write a cheaper query, or raise the timeout"):
        ask(run, ENDLESS, 0.5)
    assert time.monotonic() - started < 5
    with pytest.raises(ValueError, match="timeout: nan is not above 0"):
        ask(run, "select 1", float("nan"))


def test_memory_is_limited(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_scoring.sandboxed_query._MOST_GB", 0.2)
    with pytest.raises(ValueError, match="Out of Memory"):
        ask(run, "select list(repeat('x', 1000) || range) from range(2000000000)", 60)


def test_an_interrupt_ends_it_at_once(run: Path) -> None:
    code = (
        "from pathlib import Path; from data_scoring.sandboxed_query import ask; print('on', flush=True); "
        f"ask(Path({str(run)!r}), {ENDLESS!r}, 600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ}
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(1)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    # By itself, the query would not end; other processes may have the cores.
    assert time.monotonic() - started < 30
    assert b"KeyboardInterrupt" in errors
    # Not aborted, as by the interpreter's end while DuckDB is at work.
    assert process.returncode in (-signal.SIGINT, 130), errors


def test_a_damaged_file_is_named(run: Path) -> None:
    path = run / "rounds" / "1" / "mix.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"^view mix: .*mix.parquet.*; restore the file, or delete it and run"):
        ask(run, "select 1", 60)
