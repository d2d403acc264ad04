"""Every command in folders of any name: it does what it does in a plain one."""

import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from data_scoring.ledger import open_ledger, refresh_ledger
from flows.cli.main import main
from flows.run.folder import read_run
from tests.flows.fakes import FakeRanks, fake_ranks, values

_EVERYTHING = 'it\'s "a" [b] c* d? {e,f} 100%s größe\n#1 $HOME;&|<b>[bold]`'
# A folder of run folders from whose parts another run, column or number would be taken.
_ODD = f"~/{_EVERYTHING}/sweep/lr=0.5/source=b/shard=1/rounds/7/losses/evaluation/step-9/exp[1]"
_COUNTS = (
    "select round, shard, count(*), sum(loss) from losses group by all order by all",
    "select round, shard, count(*), count(*) filter (kept), min(reason) from selection group by all order by all",
    "select round, count(*), sum(sample), max(place) from mix group by all order by all",
    "select source, shard, count(*) from samples group by all order by all",
    "select * exclude (training_seconds, scoring_seconds) from rounds",
)


def write_config(folder: Path, texts: Path, seed: int = 0, **more: Any) -> Path:
    """Write a configuration whose run folder is `folder`/runs/x, as it is seen from `folder`."""
    refine = {"sources": [{"name": "a", "at_least": 0.9}], "max_rounds": 3, "near_duplicates": 0.9}
    config = {**values(texts, Path("runs")), "refine": refine, "seed": seed, **more}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config, allow_unicode=True))
    return path


def train_two_rounds(config: Path) -> None:
    for command in ("prepare", "train", "score", "refine", "train"):
        assert main([command, str(config)]) == 0


def results(run: Path) -> list[Any]:
    tables = [pq.read_table(run / "rounds" / name).to_pylist() for name in ("1/mix.parquet", "2/mix.parquet")]
    with open_ledger(run) as ledger:
        return [*tables, *(ledger.sql(query).fetchall() for query in _COUNTS)]


@pytest.fixture(scope="module")
def plain(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of two rounds in a plain folder."""
    with pytest.MonkeyPatch.context() as patch:
        fake_ranks(patch)
        folder = tmp_path_factory.mktemp("plain")
        patch.chdir(folder)
        train_two_rounds(write_config(folder, texts))
        return folder / "runs" / "x"


def test_a_run_is_the_same_in_any_folder(
    plain: Path, texts: Path, tmp_path: Path, fakes: FakeRanks, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / _ODD
    # What the folder's name matches as a pattern.
    other = folder.with_name("exp1") / "runs" / "x"
    shutil.copytree(plain, other)
    pq.write_table(pq.read_table(plain / "rounds" / "1" / "mix.parquet").slice(0, 9), other / "rounds/1/mix.parquet")
    config = write_config(folder, texts)
    monkeypatch.chdir(folder)
    train_two_rounds(config)
    run = folder / "runs" / "x"
    assert results(run) == results(plain)
    capsys.readouterr()
    query = "select 'rows: ' || count(*) as n from steps"
    assert main(["sql", str(run), query]) == 0
    assert main(["sql", str(plain), query]) == 0
    odd, expected = (part for part in capsys.readouterr().out.split("┌") if part)
    assert odd.split() == expected.split()
    assert main(["refine", str(run), "--round", "2", "--dry-run"]) == 0
    assert main(["status", str(run)]) == 0
    assert main(["runs", str(run.parent)]) == 0
    assert main(["run", str(run), "--dry-run"]) == 0
    assert main(["report", str(run)]) == 0
    assert main(["doctor", str(config)]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["exp[1]", _EVERYTHING])
def test_a_run_folder_may_be_renamed_to_anything(
    name: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fakes: FakeRanks
) -> None:
    run = tmp_path / name
    shutil.copytree(plain, run)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        # The commands write run.yaml again.
        assert main(["prepare", str(run)]) == 0
        assert main(["sql", str(run), "from rounds"]) == 0
        assert main(["refine", str(run), "--round", "2", "--dry-run", "--set", "refine.policy=top"]) == 0
    assert read_run(run).config.folder.absolute() == run
    assert results(run) == results(plain)
    assert fakes.jobs == []
    if name == _EVERYTHING:
        assert main(["report", str(run)]) == 0
        assert "&lt;b&gt;[bold]" in (run / "report.html").read_text()
        assert "<b>[bold]" not in (run / "report.html").read_text()


@pytest.mark.parametrize(("name", "what"), [("a\\b", "a backslash"), ("a\udcffb", "bytes that are not UTF-8")])
def test_folders_that_cannot_be_named_are_refused_before_anything_is_made(
    name: str, what: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config = write_config(tmp_path / name, texts)
    monkeypatch.chdir(tmp_path / name)
    assert main(["prepare", str(config)]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert what in line
    assert not (tmp_path / name / "runs" / "x" / "corpus").exists()


def test_sources_and_runs_have_names_of_any_script(
    plain: Path, texts: Path, tmp_path: Path, fakes: FakeRanks,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Everything but the names is as in the run whose sources are a and b."""
    names = ("हिन्दी-e\N{COMBINING ACUTE ACCENT}t\N{COMBINING CIRCUMFLEX ACCENT}", "北京.новости")
    text = write_config(tmp_path, texts, name=names[0]).read_text()
    content = yaml.safe_load(text)
    for source, name in zip(content["corpus"]["sources"], names, strict=True):
        source["name"] = name
    content["refine"]["sources"][0]["name"] = unicodedata.normalize("NFC", names[0])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content, allow_unicode=True))
    monkeypatch.chdir(tmp_path)
    train_two_rounds(tmp_path / "config.yaml")
    composed = [unicodedata.normalize("NFC", name) for name in names]
    run = tmp_path / "runs" / composed[0]
    found, expected = results(run), results(plain)
    assert [(dict(zip("ab", composed, strict=True))[source], *rest) for source, *rest in expected.pop(5)] == found.pop(
        5
    )
    # The rule of the first source is the same one.
    assert found == expected
    capsys.readouterr()
    query = f"select count(*) as n from samples where source = '{composed[1]}'"
    for command in (["status"], ["report"], ["refine", "--round", "2", "--dry-run"]):
        assert main([command[0], str(run), *command[1:]]) == 0
    assert main(["runs", "runs"]) == 0
    assert main(["sql", str(run), query]) == 0
    assert capsys.readouterr().err == ""
    page = (run / "report.html").read_text()
    assert all(name in page for name in composed)
    assert "e\N{COMBINING ACUTE ACCENT}" not in page


def test_a_ledger_of_another_folder_is_not_shown(plain: Path, tmp_path: Path) -> None:
    for name in ("exp1", "exp[1]"):
        shutil.copytree(plain, tmp_path / name)
    shutil.rmtree(tmp_path / "exp[1]" / "rounds" / "2")
    refresh_ledger(tmp_path / "exp[1]")
    with open_ledger(tmp_path / "exp[1]") as ledger:
        assert ledger.sql("select distinct round from mix").fetchall() == [(1,)]
