import shutil
from datetime import datetime
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from data_scoring.base.parquet import write_parquet
from data_scoring.ledger import DERIVED, VIEWS, open_ledger, refresh_ledger
from data_scoring.losses.shard_scoring import losses_path
from data_scoring.refine.budget import Candidate, write_budget
from data_scoring.sandboxed_query import ask
from trainer.records import STEPS


def test_an_empty_run_has_every_view_with_every_column_documented(tmp_path: Path) -> None:
    refresh_ledger(tmp_path)
    with duckdb.connect(str(tmp_path / "ledger.duckdb"), read_only=True) as ledger:
        views = {row[0] for row in ledger.sql("select view_name from duckdb_views() where not internal").fetchall()}
        assert views == VIEWS.keys() | DERIVED.keys()
        for name, columns in [(name, view.columns) for name, view in VIEWS.items()] + [
            (name, columns) for name, (_, columns, _) in DERIVED.items()
        ]:
            described = ledger.sql(f"describe {name}").fetchall()
            assert [(row[0], row[1].lower()) for row in described] == [
                (column, kind) for column, (kind, _) in columns.items()
            ]


def losses_table(losses: list[float]) -> pa.Table:
    numbers = np.arange(len(losses), dtype=np.int32)
    sources = pa.array(["a"] * len(losses)).dictionary_encode()
    return pa.table(
        {"sample": numbers, "num_tokens": numbers, "source": sources, "loss": pa.array(losses, pa.float32())}
    )


def test_it_shows_files_that_come_later_and_survives_readers_and_quotes(tmp_path: Path) -> None:
    run = tmp_path / "it's a run"
    table = losses_table([2.5])
    write_parquet(losses_path(run / "rounds" / "1", 0), table, "f")
    path = refresh_ledger(run)
    with duckdb.connect(str(path)) as reader:
        write_parquet(losses_path(run / "rounds" / "2", 11), table, "f")
        assert reader.sql("select round, shard, loss from losses order by round").fetchall() == [
            (1, 0, 2.5),
            (2, 11, 2.5),
        ]
        refresh_ledger(run)
        assert len(reader.sql("from losses").fetchall()) == 2


def _write_row(run: Path, name: str) -> None:
    """Write a file with one row of ones for a view."""
    view = VIEWS[name]
    path = run / view.files.replace("*", "1")
    path.parent.mkdir(parents=True, exist_ok=True)
    ones = {"integer[]": "[1]", "timestamp": "'2001-01-01'"}
    columns = ", ".join(f"{ones.get(kind, '1')}::{kind} as {column}" for column, (kind, _) in view.columns.items())
    duckdb.sql(f"select {columns}").write_parquet(str(path))


@pytest.mark.parametrize("is_in_memory", [False, True])
def test_a_connection_sees_the_files_of_every_view_that_come_later(is_in_memory: bool, tmp_path: Path) -> None:
    path = refresh_ledger(tmp_path)
    with open_ledger(tmp_path) if is_in_memory else duckdb.connect(str(path), read_only=True) as reader:
        for name in VIEWS:
            assert reader.sql(f"from {name}").fetchall() == []
            _write_row(tmp_path, name)
            [row] = reader.sql(f"from {name}").fetchall()
            columns = reader.sql(f"describe {name}").fetchall()
            assert [column[1].lower() for column in columns] == [kind for kind, _ in VIEWS[name].columns.values()]
            assert dict(zip((column[0] for column in columns), row, strict=True)).get("round", 1) == 1
        assert len(reader.sql("from rounds").fetchall()) == 1


def test_losses_with_and_without_their_shard_are_one_view(tmp_path: Path) -> None:
    table = losses_table([1.5])
    for shard, each in enumerate([table, table.append_column("shard", pa.array([1], pa.int32())), table]):
        write_parquet(losses_path(tmp_path / "rounds" / "1", shard), each, "f")
    with duckdb.connect(str(refresh_ledger(tmp_path)), read_only=True) as ledger, open_ledger(tmp_path) as memory:
        for reader in (ledger, memory):
            assert reader.sql("select shard from losses order by shard").fetchall() == [(0,), (1,), (2,)]


def test_a_copied_run_has_its_own_rows_and_a_moved_one_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy [1]"
    write_parquet(losses_path(run / "rounds" / "1", 0), losses_table([1.5]), "f")
    refresh_ledger(run)
    shutil.copytree(run, copy)
    write_parquet(losses_path(copy / "rounds" / "2", 3), losses_table([2.5]), "f")
    rows = [(1, 0, 1.5), (2, 3, 2.5)]
    for is_moved in (False, True):
        place = copy.rename(tmp_path / "moved") if is_moved else copy
        monkeypatch.chdir(place)
        for path in (str(place / "ledger.duckdb"), "ledger.duckdb"):
            with duckdb.connect(path, read_only=True) as ledger:
                assert ledger.sql("select round, shard, loss from losses order by round").fetchall() == rows


def test_the_types_of_real_files_are_the_documented_ones(tmp_path: Path) -> None:
    write_parquet(losses_path(tmp_path / "rounds" / "1", 0), losses_table([0, 1, 2]), "f")
    refresh_ledger(tmp_path)
    described = ask(tmp_path, "describe losses").fetchall()
    assert [row[1].lower() for row in described] == [kind for kind, _ in VIEWS["losses"].columns.values()]


def test_mistakes_in_a_query_are_value_errors(tmp_path: Path) -> None:
    refresh_ledger(tmp_path)
    with pytest.raises(ValueError, match="lists the views"):
        ask(tmp_path, "select nothing from nowhere")


STEP = {"loss": 2.0, "lr": 0.1, "grad_norm": 1.0, "num_samples": 2, "num_tokens": 300, "tokens_per_second": 3.0}


def test_rounds_say_what_they_cost(tmp_path: Path) -> None:
    one, two = (tmp_path / "rounds" / number for number in "12")
    times = [datetime(2026, 1, 2, 3, 4, second) for second in (1, 2)]
    steps = [{"step": n + 1, **STEP, "seconds": 10.0 * n + 5, "ended_at": times[n]} for n in range(2)]
    write_parquet(one / "steps.parquet", pa.Table.from_pylist(steps, STEPS), "f")
    candidates = [Candidate("prefix:8", 50), Candidate("full", 200)]
    write_budget(one, candidates, "prefix:8", 7, 12.5, "f")
    # Written by a version that did not measure time.
    older = pa.schema([field for field in STEPS if field.name in ("step", *STEP)])
    write_parquet(two / "steps.parquet", pa.Table.from_pylist([{"step": 1, **STEP}], older), "f")
    cost = "training_seconds, scoring_seconds, training_cost, scoring_cost"
    assert ask(tmp_path, f"select round, {cost} from rounds").fetchall() == [
        (1, 15.0, 12.5, 600, 57),
        (2, None, None, 300, None),
    ]
    assert ask(tmp_path, "select round, step, seconds, ended_at from steps order by all").fetchall() == [
        (1, 1, 5.0, times[0]),
        (1, 2, 15.0, times[1]),
        (2, 1, None, None),
    ]
    assert ask(tmp_path, "select candidate, seconds from budgets order by 1").fetchall() == [
        ("calibration", None), ("full", None), ("prefix:8", 12.5),
    ]  # fmt: skip
