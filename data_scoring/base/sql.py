"""Values inside SQL text, for the places where DuckDB takes no parameters, and DuckDB's errors in ours."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from data_scoring.base.files import disk_error

if TYPE_CHECKING:
    import duckdb


@contextmanager
def writing_errors(path: Path) -> Iterator[None]:
    """Turn what DuckDB raises for a full disk into the OSError that everything else raises, naming `path`."""
    import duckdb

    try:
        yield
    except (duckdb.IOException, duckdb.OutOfMemoryException) as error:
        other = ValueError(f"{path}: cannot be written ({' '.join(str(error).split())}); mend it and go on")
        raise disk_error(str(error), path) or other from None


@contextmanager
def bounded(folder: Path, memory_gb: float) -> Iterator["duckdb.DuckDBPyConnection"]:
    """Yield a connection to an empty database that takes `memory_gb` GB at most and puts the rest under `folder`."""
    import duckdb

    spill = folder / ".spill"
    shutil.rmtree(spill, ignore_errors=True)
    # DuckDB's own limit does not cover what it reads and writes files with.
    limit = f"{round(memory_gb * 0.8 * 1000)}MB"
    try:
        with duckdb.connect(config={"memory_limit": limit, "temp_directory": str(spill)}) as connection:
            yield connection
    finally:
        shutil.rmtree(spill, ignore_errors=True)


def literal(value: object) -> str:
    """Return `value` as a quoted SQL string."""
    return "'" + str(value).replace("'", "''") + "'"


def random_bits(*parts: object) -> str:
    """Return the SQL expression of 64 random bits that `parts`, integers or SQL expressions, decide alone.

    DuckDB's hash of several values is a xor of theirs: with it alone, two seeds would order all rows alike but for a
    constant. Hashing once more mixes them.
    """
    return f"hash(hash({', '.join(str(part) for part in parts)}))"


def gumbel(bits: str) -> str:
    """Return the SQL of Gumbel noise made of the 64 random bits that the expression `bits` gives.

    Of samples with the logarithms of their weights plus this noise, the highest are a draw without replacement. The
    high 52 bits make a uniform number strictly between 0 and 1 without rounding, so that the noise is always finite.
    """
    return f"-ln(-ln(((({bits}) >> 12)::double + 0.5) * {2.0**-52!r}::double))"
