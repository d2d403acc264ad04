"""SQL text for DuckDB where it takes no parameters, bounded connections, and translation of DuckDB's errors.

DuckDB takes `*`, `?` and `[` in a path for a pattern, and folders called key=value for columns. Every path in SQL comes
from this module, which makes it literal.
"""

import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_scoring.base.engine import num_threads
from data_scoring.base.files import disk_error, fingerprint
from data_scoring.base.messages import shown

if TYPE_CHECKING:
    import duckdb

# The shard in the name of a file, such as shard=0001.parquet, whatever the folders on the way are called.
SHARD_OF_FILE = r"regexp_extract(filename, '/shard=(\d+)\.parquet$', 1)::int"
# Python keeps other bytes of a file's name as surrogates.
_UTF_8 = re.compile("[^\ud800-\udfff]*")
_MOST_BRACKETS = 100
# By default, the path of the database that was opened, and .tmp, which DuckDB puts before a question mark.
_SPILL = r"regexp_replace(current_setting('temp_directory'), '(?s)^([^?]*)\.tmp(\?.*)$', '\1\2.tmp')"


@contextmanager
def writing_errors(path: Path) -> Iterator[None]:
    """Convert DuckDB's error for a full disk to an OSError that names `path`."""
    import duckdb

    try:
        yield
    except duckdb.Error as error:
        full = disk_error(str(error), path)
        if full is None and not isinstance(error, (duckdb.IOException, duckdb.OutOfMemoryException)):
            raise
        other = ValueError(f"{path}: cannot be written ({' '.join(str(error).split())}); fix this and run again")
        raise full or other from None


@contextmanager
def bounded(folder: Path, memory_gb: float) -> Iterator["duckdb.DuckDBPyConnection"]:
    """Yield a connection to an empty database that uses at most `memory_gb` GB and spills to disk under `folder`.

    Only one process at a time may use the same folder. What a killed process has spilled there is deleted.
    """
    import duckdb

    spill = folder / ".spill"
    shutil.rmtree(spill, ignore_errors=True)
    # DuckDB's own limit does not cover its buffers for reading and writing files.
    config: dict[str, Any] = {
        "memory_limit": f"{round(memory_gb * 0.8 * 1000)}MB",
        "temp_directory": str(spill.absolute()),
    }
    if (threads := num_threads()) is not None:
        config["threads"] = threads
    try:
        with duckdb.connect(config=config) as connection:
            yield connection
    finally:
        shutil.rmtree(spill, ignore_errors=True)


@contextmanager
def bounded_worker(scratch: Path, memory_gb: float) -> Iterator["duckdb.DuckDBPyConnection"]:
    """Yield a connection as `bounded` does, for one of many processes, each of which spills under `scratch`.

    What a killed process has spilled stays there.
    """
    with (
        tempfile.TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True) as folder,
        bounded(Path(folder), memory_gb) as connection,
    ):
        yield connection


def check_nesting(sql: str) -> None:
    """Raise ValueError if `sql` has more nested brackets than DuckDB's parser reads in reasonable time."""
    # The time of the parser grows with the third power of the depth. Brackets in texts count, too.
    depth = 0
    for letter in sql:
        depth += (letter in "([{") - (letter in ")]}")
        if depth > _MOST_BRACKETS:
            raise ValueError(f"sql: {shown(sql)} has more than {_MOST_BRACKETS} nested brackets; write fewer")


def literal(value: object) -> str:
    """Return `value` as a quoted SQL string."""
    return "'" + str(value).replace("'", "''") + "'"


def parquet_rows(place: Path | Iterable[Path], pattern: str | None = None, *, options: str = "") -> str:
    """Return the SQL relation of the rows of Parquet files; their paths are literal, whatever they contain.

    place: a file, several files, or, with `pattern`, a folder. pattern: a glob of files in that folder; only this is a
    pattern, and files that match later count, too. options: others of DuckDB's read_parquet, such as "filename = true".
    """
    places = [place] if isinstance(place, Path) else list(place)
    names = [escape_path(each) if pattern is None else f"{escape_path(each)}/{pattern}" for each in places]
    return _read_parquet([literal(name) for name in names], options)


def _read_parquet(patterns: list[str], options: str) -> str:
    # Otherwise, a folder such as source=web on the way overrides the column `source`.
    arguments = [f"[{', '.join(patterns)}]", "hive_partitioning = false", *filter(None, [options])]
    return f"read_parquet({', '.join(arguments)})"


def rows_beside(path: Path, pattern: str, *, options: str) -> str:
    """Return the SQL relation of the Parquet files that match `pattern` in the folder of the database `path`.

    A view over it finds them wherever the database is, if that is opened by itself: DuckDB does not tell a view where
    its database is, but the default of temp_directory does. A database that is attached to another one reads the files
    in the folder of `path`. The view needs the condition of `condition_of_files`. options: others of read_parquet.
    """
    folder = rf"regexp_replace(regexp_replace({_SPILL}, '[^/]*$', ''), '[*?[]', '[\0]', 'g')"
    beside = f"{folder} || {literal(pattern)}"
    written = literal(f"{escape_path(path.parent)}/{pattern}")
    place = f"case when {_is_opened_by_itself(path)} then {beside} else {written} end"
    return _read_parquet([place], options)


def condition_of_files(path: Path) -> str:
    """Return the SQL condition that the files of `rows_beside` are those of the database; else, the query fails.

    A view does not know which open database it is in. So it looks for the others that have views like it, whatever
    they are called: each contains this condition, by whose literals they are found.
    """
    several = f"several databases called {path.name}, or copies of one, are open; open another, and attach these to it"
    copied = f"a copy of this database, which was written as {path}, is attached, too; detach it, or open it by itself"
    elsewhere = (
        f"this database was written as {path}, and reads the files there while it is attached; attach it from there, "
        "open it by itself, or run `reprise report`, or `reprise sweep`, again"
    )
    # Without quotes, which the text of a view doubles.
    like_it, same = f"views beside {fingerprint(path.name)}", f"views of {fingerprint(str(path))}"
    return f"""(select case
            when {_is_opened_by_itself(path)} then case when count(*) = 1 then true else error({literal(several)}) end
            when not coalesce(bool_or(path = {literal(path)}), false) then error({literal(elsewhere)})
            when bool_or(is_same and path <> {literal(path)}) then error({literal(copied)})
            else true
        end from (
            select path, coalesce(bool_or(contains(sql, {literal(same)})), false) as is_same
            from duckdb_databases() left join duckdb_views() using (database_name)
            where {_is_called("path", path, "")} or contains(sql, {literal(like_it)})
            group by database_name, path
        ))"""


def _is_opened_by_itself(path: Path) -> str:
    return f"coalesce({_is_called(_SPILL, path, '.tmp')}, false)"


def _is_called(expression: str, path: Path, ending: str) -> str:
    """Return the SQL condition that a path is that of a database called `path`, or kept from it under another name."""
    name = rf"(?s)^(.*/)?{re.escape(path.stem)}(-\d+)?{re.escape(path.suffix + ending)}$"
    return f"regexp_matches({expression}, {literal(name)})"


def copy_to_parquet(query: str, path: Path, options: str) -> str:
    """Return the SQL statement that writes the rows of `query` to the file `path`, whose name is literal."""
    check_path(path)
    return f"copy ({query}) to {literal(path.absolute())} (format parquet, {options})"


def check_path(path: Path) -> None:
    """Raise ValueError if DuckDB cannot use `path`, whatever the quoting."""
    text = str(path.absolute())
    # In patterns and in names of databases, DuckDB takes a backslash for a slash, and nothing escapes it.
    what = "a backslash" if "\\" in text else None if _UTF_8.fullmatch(text) else "bytes that are not UTF-8"
    if what is not None:
        raise ValueError(f"{text!r}: contains {what}, which DuckDB cannot read; rename the folder, or use another")


def escape_path(path: Path) -> str:
    """Return the pattern that matches `path` alone."""
    check_path(path)
    # In patterns, DuckDB drops `..` together with the part before it, even if that is a link.
    absolute = path.resolve() if ".." in path.parts else path.absolute()
    return re.sub(r"[*?[]", r"[\g<0>]", str(absolute))


def random_bits(*parts: object) -> str:
    """Return the SQL expression of 64 random bits that depend only on `parts`, integers or SQL expressions.

    DuckDB's hash of several values is the xor of their hashes, so a second seed would only xor all rows with a
    constant. Hashing once more mixes the bits.
    """
    return f"hash(hash({', '.join(str(part) for part in parts)}))"


def gumbel(bits: str) -> str:
    """Return the SQL of Gumbel noise computed from the 64 random bits of the expression `bits`.

    The samples with the highest log-weight plus noise are a weighted draw without replacement. The high 52 bits make a
    uniform number strictly between 0 and 1 without rounding, so the noise is always finite.
    """
    return f"-ln(-ln(((({bits}) >> 12)::double + 0.5) * {2.0**-52!r}::double))"
