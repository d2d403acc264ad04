"""Paths in SQL are literal, whatever is in them."""

import ast
import re
import shutil
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_scoring.base.databases import replacing_views
from data_scoring.base.sql import (
    bounded,
    check_path,
    condition_of_files,
    copy_to_parquet,
    literal,
    parquet_rows,
    rows_beside,
)

ROOT = Path(__file__).parents[3]
# A name, and others beside it that it matches if it is taken for a pattern.
ODD = {
    "exp[1]": ("exp1",),
    "[!a]": ("b",),
    "[a-c]": ("b",),
    "[[]": ("[",),
    "a*": ("a", "ab"),
    "**": ("deep/er",),
    "what?": ("whats",),
    "{a,b}": ("a", "b"),
    'it\'s "mine"': (),
    "100%20 %s #1 größe \u65e5": (),
    "two\nlines\t": (),
    "$HOME;`id` & <b>[bold]|": (),
    "~": (),
    "file:": (),
    "lr=0.5": (),
    "shard=9": (),
    "source=web": (),
    "rounds/7/losses": (),
}


def write(path: Path, number: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"x": [number], "source": ["mine"], "lr": [0.1], "shard": [1]}), path)
    return path


@pytest.mark.parametrize("name", ODD)
def test_nothing_but_the_named_file_is_read(name: str, tmp_path: Path) -> None:
    file = write(tmp_path / name / "part=1.parquet", 1)
    for decoy in ODD[name]:
        write(tmp_path / decoy / "part=1.parquet", 2)
    columns = "select x, source, lr, shard, filename from"
    expected = [(1, "mine", 0.1, 1, str(file))]
    for place in (parquet_rows(file), parquet_rows([file]), parquet_rows(file.parent, "part=*.parquet")):
        assert duckdb.sql(f"{columns} {place}").fetchall() == expected


@pytest.mark.parametrize("name", ODD)
def test_files_are_written_and_sorts_spill_where_they_should(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir(parents=True)
    for decoy in ODD[name]:
        (tmp_path / decoy).mkdir(parents=True, exist_ok=True)
    with bounded(folder, 0.08) as connection:
        connection.execute("set threads = 1; create table t as select hash(range) as a from range(8_000_000)")
        assert any((folder / ".spill").iterdir())
        connection.execute(copy_to_parquet("select 1 as x", folder / "one.parquet", "compression zstd"))
    assert pq.read_table(folder / "one.parquet").to_pylist() == [{"x": 1}]


def test_a_link_on_the_way_is_followed_before_its_parent(tmp_path: Path) -> None:
    write(tmp_path / "a[1].parquet", 2)
    write(tmp_path / "real" / "a[1].parquet", 1)
    (tmp_path / "real" / "deep").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "deep")
    assert duckdb.sql(f"select x from {parquet_rows(tmp_path / 'link' / '..' / 'a[1].parquet')}").fetchall() == [(1,)]


def test_relative_paths_do_not_depend_on_how_they_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("~/x.parquet", "s3:/x.parquet", "http:/x.parquet"):
        write(tmp_path / name, 1)
        assert duckdb.sql(f"select x from {parquet_rows(Path(name))}").fetchall() == [(1,)]


@pytest.mark.parametrize(("name", "what"), [("a\\b", "a backslash"), ("a\udcffb", "bytes that are not UTF-8")])
def test_what_no_quoting_helps_is_refused_in_a_line(name: str, what: str, tmp_path: Path) -> None:
    for use in (check_path, parquet_rows, lambda path: copy_to_parquet("select 1", path, "compression zstd")):
        with pytest.raises(ValueError, match=what) as raised:
            use(tmp_path / name)
        assert "\n" not in str(raised.value)
        str(raised.value).encode()


def _modules() -> list[Path]:
    return [path for room in ("data_scoring", "flows", "trainer", "kernels") for path in (ROOT / room).rglob("*.py")]


def test_no_other_place_makes_a_path_into_sql() -> None:
    raw = re.compile(r"(read_\w+|\w+_scan|\bglob)\s*\(|\bcopy\s*\(|\battach\s+['{]", re.I)
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in _modules()
        if path != ROOT / "data_scoring" / "base" / "sql.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and raw.search(node.value)
    ]
    assert found == []


def test_databases_are_opened_in_memory_or_in_one_place() -> None:
    places = {
        str(path.relative_to(ROOT))
        for path in _modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "duckdb.connect" and node.args
    }
    assert places == {"data_scoring/base/databases.py"}


def _database(folder: Path, number: int) -> Path:
    """Write a database with a view over the file beside it, which holds `number`."""
    write(folder / "part=1.parquet", number)
    path = folder / "views.duckdb"
    with replacing_views(path) as connection:
        rows = rows_beside(path, "part=*.parquet", options="filename = true")
        connection.execute(f"create view v as select x from {rows} where {condition_of_files(path)}")
        connection.execute("comment on view v is 'Numbers.'")
    return path


@pytest.mark.parametrize("name", ODD)
def test_a_database_reads_the_files_beside_it_wherever_it_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, copy = tmp_path / "original", tmp_path / "copies" / name
    path = _database(original, 1)
    shutil.copytree(original, copy)
    write(copy / "part=1.parquet", 2)
    for decoy in ODD[name]:
        write(tmp_path / "copies" / decoy / "part=1.parquet", 3)
    monkeypatch.chdir(copy)
    for place in (str(copy / path.name), path.name):
        with duckdb.connect(place, read_only=True) as connection:
            assert connection.sql("from v").fetchall() == [(2,)]
    shutil.rmtree(original)
    with duckdb.connect(str(copy / path.name)) as connection:
        assert connection.sql("from v").fetchall() == [(2,)]


def test_an_attached_database_reads_its_own_files_or_none(tmp_path: Path) -> None:
    first, second = _database(tmp_path / "first", 1), _database(tmp_path / "second", 2)
    shutil.copytree(first.parent, tmp_path / "copy")
    with duckdb.connect(str(tmp_path / "mine.duckdb")) as connection:
        for name, path in {"a": first, "b": second}.items():
            connection.execute(f"attach {literal(path)} as {name} (read_only)")
        assert connection.sql("from a.v union all from b.v order by 1").fetchall() == [(1,), (2,)]
        connection.execute("detach a")
        connection.execute(f"attach {literal(tmp_path / 'copy' / first.name)} as c (read_only)")
        with pytest.raises(duckdb.InvalidInputException, match=f"written as {first}, and reads the files there while"):
            connection.sql("from c.v").fetchall()
    with duckdb.connect(str(first), read_only=True) as connection:
        assert connection.sql("from v").fetchall() == [(1,)]
        connection.execute(f"attach {literal(second)} as b (read_only)")
        with pytest.raises(duckdb.InvalidInputException, match=r"several databases called views\.duckdb, or copies"):
            connection.sql("from b.v").fetchall()


@pytest.mark.parametrize(("opened", "attached", "setting"), [
    ("mine", ("original", "copy"), ""),
    ("mine", ("copy", "original"), ""),
    ("copy", ("original",), "set temp_directory = '/tmp/elsewhere'"),
    ("second", ("renamed",), ""),
    ("mine", ("second", "renamed"), ""),
    ("unrelated", ("renamed",), ""),
])  # fmt: skip
def test_a_copy_never_reads_the_files_of_another(
    opened: str, attached: tuple[str, ...], setting: str, tmp_path: Path
) -> None:
    """Each view gives the number in its own folder, or an error: no copy, renamed or not, is taken for its original."""
    places = {name: _database(tmp_path / name, number) for number, name in enumerate(("original", "second"))}
    shutil.copytree(tmp_path / "original", tmp_path / "copy")
    write(tmp_path / "copy" / "part=1.parquet", 2)
    (tmp_path / "renamed").mkdir()
    places |= {"copy": tmp_path / "copy" / "views.duckdb", "mine": tmp_path / "mine.duckdb"}
    places["unrelated"] = tmp_path / "views.duckdb"
    places["renamed"] = shutil.copy(places["original"], tmp_path / "renamed" / "first.duckdb")
    for name in ("mine", "unrelated"):
        duckdb.connect(str(places[name])).close()
    write(tmp_path / "renamed" / "part=1.parquet", 3)
    write(tmp_path / "part=1.parquet", 4)
    right = {"original": 0, "second": 1, "copy": 2, "renamed": 3}
    with duckdb.connect(str(places[opened]), read_only=True) as connection:
        connection.execute(setting or "select 1")
        for name in attached:
            connection.execute(f"attach {literal(places[name])} as {name} (read_only)")
        for name in attached:
            try:
                rows = connection.sql(f"from {name}.v").fetchall()
            except duckdb.InvalidInputException as error:
                assert re.search("a copy of this database|several databases called|was written as", str(error))
            else:
                assert rows == [(right[name],)]
        if opened in right:
            with pytest.raises(duckdb.InvalidInputException):
                connection.sql("from views.v").fetchall()
