"""The views over a search, as other programs open them."""

import shutil
from pathlib import Path

import duckdb
import pyarrow as pa

from data_scoring.base.parquet import write_parquet
from flows.experiments.sweep_results import write_views
from flows.experiments.trials import TRIAL


def _write_trial(folder: Path, name: str) -> None:
    table = pa.Table.from_pylist([{"trial": name, "state": "trained"}], schema=TRIAL)
    write_parquet(folder / name / "trial.parquet", table, "f")


def test_a_copied_search_has_its_own_trials_and_a_moved_one_keeps_them(tmp_path: Path) -> None:
    folder, copy = tmp_path / "search", tmp_path / "copy [1]"
    path = write_views(folder)
    # What DuckDB 1.0 writes, and 1.5 reads.
    assert int.from_bytes(path.read_bytes()[12:20], "little") == 64
    shutil.copytree(folder, copy)
    _write_trial(folder, "original")
    with duckdb.connect(str(copy / path.name), read_only=True) as views:
        assert views.sql("from trials").fetchall() == []
        _write_trial(copy, "copied")
        assert views.sql("select trial from trials").fetchall() == [("copied",)]
    shutil.rmtree(folder)
    with duckdb.connect(str(copy.rename(tmp_path / "moved") / path.name), read_only=True) as views:
        assert views.sql("select trial from trials").fetchall() == [("copied",)]
