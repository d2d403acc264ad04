"""SQL text for DuckDB where it takes no parameters, bounded connections, and translation of DuckDB's errors."""

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
    """Convert DuckDB's error for a full disk to an OSError that names `path`."""
    import duckdb

    try:
        yield
    except (duckdb.IOException, duckdb.OutOfMemoryException, duckdb.FatalException) as error:
        other = ValueError(f"{path}: cannot be written ({' '.join(str(error).split())}); fix this and run again")
        raise disk_error(str(error), path) or other from None


@contextmanager
def bounded(folder: Path, memory_gb: float) -> Iterator["duckdb.DuckDBPyConnection"]:
    """Yield a connection to an empty database that uses at most `memory_gb` GB and spills to disk under `folder`."""
    import duckdb

    spill = folder / ".spill"
    shutil.rmtree(spill, ignore_errors=True)
    # DuckDB's own limit does not cover its buffers for reading and writing files.
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
