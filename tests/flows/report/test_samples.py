"""The command `samples`, its page, the samples in the report and in SQL: a run whose losses and selection are known."""

import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from data_scoring.base.parquet import write_parquet
from data_scoring.base.progress import silent
from data_scoring.corpus.prepare_corpus import prepare_corpus
from data_scoring.ledger import open_ledger
from data_scoring.refine.candidates import CONTAMINATED, OUTLIER
from data_scoring.tokenizer.tokenizer import HuggingFaceTokenizer
from flows.cli.main import main
from flows.display.visible_text import cut, cut_to_width, visible
from flows.report.run_report import write_report
from flows.report.sample_tables import selection_examples
from flows.report.samples import find_samples, query
from flows.run.config import RunConfig, parse_config
from flows.run.folder import Run, open_run
from tests.conftest import MakeOnce, make_documents
from tests.flows.fakes import values

# What a browser or a terminal would act on, at the start of documents that are easily found.
SCRIPT = "<script>alert('&amp;')</script> & \x1b[31mred\x07 \u202eright \x00 end"
CHINESE = "今天天气很好，我们去公园散步。" * 30
SHARDS = 2


def config_of(folder: Path) -> RunConfig:
    config = values(folder, folder / "runs")
    config["corpus"] |= {"seq_length": 64, "num_shards": SHARDS, "validation_fraction": 1e-9}
    return parse_config(config, "test")


def make_run(folder: Path) -> None:
    texts = {"a": [SCRIPT + " x" * 30, *make_documents(20, 1)], "b": [CHINESE, *make_documents(20, 2)]}
    for name, documents in texts.items():
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    run = open_run(config_of(folder))
    prepare_corpus(run.config.corpus, run.config.tokenizer, run.config.seed, run.corpus_folder, "f", silent)
    generator = np.random.default_rng(3)
    for shard in range(SHARDS):
        count = run.corpus().num_samples(shard)
        samples = np.arange(count, dtype=np.int32)
        # Round 2 was scored, too, but nothing was selected after it.
        for scored in (1, 2):
            loss = generator.permutation(np.arange(count) * 1.0 + shard / 2).astype(np.float32)
            table = pa.table({"sample": samples, "num_tokens": np.full(count, 64, np.int32), "loss": loss})
            write_parquet(run.round_folder(scored) / "losses" / f"shard={shard:04d}.parquet", table, "")
            seen = {"step": np.ones(count, np.int32), "shard": np.full(count, shard, np.int32), "sample": samples}
            before = loss + generator.permutation(np.arange(count) - 4).astype(np.float32)
            path = run.round_folder(scored) / "seen" / f"step={shard:08d}.parquet"
            write_parquet(path, pa.table({**seen, "loss": before}), "")
            if scored == 1:
                kept = loss >= count // 2
                reason = np.where(kept, "drawn by loss", "not drawn").astype(object)
                aside = {OUTLIER: loss >= count - 2, CONTAMINATED: (loss >= 1) & (loss < 3)}
                for name, chosen in aside.items():
                    reason[chosen], kept = name, kept & ~chosen
                selection = pa.table({"sample": samples, "loss": loss, "kept": kept, "reason": reason.tolist()})
                write_parquet(run.round_folder(2) / "selection" / f"shard={shard:04d}.parquet", selection, "")


@pytest.fixture(scope="module")
def run(make_once: MakeOnce) -> Run:
    return open_run(config_of(make_once("samples", make_run)))


def known(run: Run, scored: int = 1) -> list[dict[str, Any]]:
    """Return what the files say of every sample."""
    with open_ledger(run.folder) as ledger:
        relation = ledger.sql(
            f"""select shard, sample, source, l.loss, s.loss as seen_loss, kept, d.reason from samples
            join (from losses where round = {scored}) l using (shard, sample)
            join (from seen where round = {scored}) s using (shard, sample)
            left join (from selection where round = {scored + 1}) d using (shard, sample)"""
        )
        return [dict(zip(relation.columns, row, strict=True)) for row in relation.fetchall()]


def identities(rows: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(row["shard"], row["sample"]) for row in rows]


def test_orders_are_those_of_the_losses(run: Run) -> None:
    rows, aside = known(run), {OUTLIER, CONTAMINATED}
    dropped = [row for row in rows if not row["kept"] and row["reason"] not in aside]
    grown = [row for row in rows if row["loss"] > row["seen_loss"]]
    medians = {name: np.median([row["loss"] for row in rows if row["source"] == name]) for name in "ab"}

    def distance(row: dict[str, Any]) -> float:
        return abs(float(row["loss"] - medians[row["source"]]))

    typical = [
        sorted((r for r in rows if r["source"] == name), key=lambda r: (distance(r), r["shard"], r["sample"]))
        for name in "ab"
    ]
    for order, expected in (
        ("hardest", sorted(rows, key=lambda row: -row["loss"])),
        ("easiest", sorted(rows, key=lambda row: row["loss"])),
        ("dropped", sorted(dropped, key=lambda row: row["loss"])),
        ("forgotten", sorted(grown, key=lambda r: (r["seen_loss"] - r["loss"], r["shard"], r["sample"]))),
        ("typical", [typical[0][0], typical[1][0], typical[0][1], typical[1][1]]),
    ):
        found = find_samples(run.folder, order, 4).samples
        assert [(sample.shard, sample.sample) for sample in found] == identities(expected[:4]), order
        assert [sample.loss for sample in found] == [row["loss"] for row in expected[:4]]


def test_fates_and_reasons_are_those_of_the_selection(run: Run) -> None:
    rows = known(run)
    expected = {
        key: ("kept" if row["kept"] else "dropped" if row["reason"] == "not drawn" else "put aside", row["reason"])
        for row, key in zip(rows, identities(rows), strict=True)
    }
    found = {(sample.shard, sample.sample): (sample.fate, sample.reason) for sample in
             find_samples(run.folder, "all", 1000).samples}  # fmt: skip
    assert found == expected
    assert {fate for fate, _ in found.values()} == {"kept", "dropped", "put aside"}
    assert {sample.fate for sample in find_samples(run.folder, "hardest", 5, scored_round=2).samples} == {None}


@pytest.mark.parametrize(
    ("where", "source", "is_wanted"),
    [
        ("loss between 2 and 6 -- a comment", None, lambda row: 2 <= row["loss"] <= 6),
        ("reason = 'outlier' or reason = 'contaminated'", "b", lambda row: row["source"] == "b"
         and row["reason"] in (OUTLIER, CONTAMINATED)),
        ("forgotten > 2 and fate = 'kept'", "a", lambda row: row["source"] == "a" and row["kept"]
         and row["loss"] - row["seen_loss"] > 2),
    ],
)  # fmt: skip
def test_conditions_are_duckdbs(run: Run, where: str, source: str | None, is_wanted: Any) -> None:
    expected = {key for row in known(run) for key in identities([row]) if is_wanted(row)}
    found = find_samples(run.folder, "all", 1000, where=where, source=source).samples
    assert {(sample.shard, sample.sample) for sample in found} == expected != set()


def test_conditions_search_text_and_files(run: Run) -> None:
    found = find_samples(run.folder, "all", 100, where="text like '%<script>%' and file like '%a.jsonl'").samples
    assert found
    assert all("<script>" in sample.text for sample in found)
    assert found[0].origin is not None
    assert (Path(found[0].origin.file).name, found[0].origin.document) == ("a.jsonl", 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--where", "lossy > 1"], "where: 'lossy > 1': .*lossy.*; give a DuckDB condition over the columns shard,"),
        (["--where", "loss >"], "where: 'loss >': .*; give a DuckDB condition over"),
        (["--where", ""], "where: '': .*; give a DuckDB condition over"),
        (["--where", "1) ; drop view samples; select (1"], "where: .*; give a DuckDB condition over"),
        (["--where", "file in (select content from read_text('/etc/passwd'))"], "where: .*; give a DuckDB condition"),
        (["--source", "c"], "source: 'c' is none of the run's sources: a, b"),
        (["--round", "3"], "round 3 was not scored; give one of 1, 2"),
        (["--dropped", "--round", "2"], "dropped: nothing was selected after round 2 yet"),
        (["--hardest", "0"], "--limit: 0 is not above 0"),
        (["--chars", "-1"], "--chars: -1 is not above 0"),
    ],
)
def test_mistakes_are_one_line(run: Run, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["samples", str(run.folder), *options]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert re.match(f"error: {message}", line)


def test_the_terminal_gets_no_control_characters(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["samples", str(run.folder), "--where", "text like '%script>%' or text like '%今天%'"]
    assert main([*arguments, "--chars", "1000"]) == 0
    output = capsys.readouterr().out
    assert {letter for letter in output if not letter.isprintable()} == {"\n"}
    assert r"\x1b[31mred\x07 \u202eright \x00 end" in output
    assert "今天天气很好，" in output
    assert "a.jsonl document 1 from token 0" in output


def test_the_terminal_gets_one_line_of_each_text(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["samples", str(run.folder), "--hardest", "6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 3 * 6
    assert all(len(line) <= 40 and line.endswith("…") for line in lines[3::3])
    assert main(["samples", str(run.folder), "--hardest", "6", "--chars", "10"]) == 0
    assert all(len(line) >= 3 + 11 for line in capsys.readouterr().out.splitlines()[3::3])


@pytest.mark.parametrize(
    ("text", "width", "expected"),
    [
        ("今天天气", 8, "今天天气"),
        ("今天天气", 7, "今天天…"),
        ("今天天气", 6, "今天…"),
        ("abcd", 3, "ab…"),
        ("", 5, ""),
    ],
)
def test_wide_characters_take_two_columns(text: str, width: int, expected: str) -> None:
    assert cut_to_width(text, width) == expected


def test_visible_text_keeps_letters_of_every_script() -> None:
    assert visible("a\u3000今\u00a0é🙂\\") == "a\u3000今\u00a0é🙂\\"
    assert visible("a\n\tb\u2028\ud800", kept="\n\t") == "a\n\tb\\u2028\\ud800"
    assert (cut("今天", 2), cut("今天天", 2)) == ("今天", "今天…")


class _Page(HTMLParser):
    """What a page consists of: its tags, and the text in each <pre>."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "pre":
            self.texts.append("")

    def handle_data(self, data: str) -> None:
        if self.texts and self.tags[-1] == "pre":
            self.texts[-1] += data


def test_the_page_has_whole_texts_and_runs_none_of_them(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert main(["samples", str(run.folder), "--easiest", "1000", "--html", str(page)]) == 0
    assert capsys.readouterr().out == f"page: {page}\n"
    content, found = page.read_text(encoding="utf-8"), find_samples(run.folder, "easiest", 1000).samples
    parsed = _Page(content)
    assert parsed.tags.count("script") == 1
    assert parsed.tags.count("section") == len(found) == len(known(run))
    # A browser drops the first line break.
    shown = [text.removeprefix("\n").rstrip("\n") for text in parsed.texts]
    assert shown == [visible(sample.text, kept="\n\t").rstrip("\n") for sample in found]
    assert html.escape("<script>") in content
    assert "\x1b" not in content


def test_runs_without_origins_have_samples_and_say_so(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "x"
    shutil.copytree(run.folder, old)
    (old / "corpus" / "documents.parquet").unlink()
    assert main(["samples", str(old), "--hardest", "2", "--chars", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("note: ") and "files and documents of samples are unknown" in lines[0]
    assert len(lines) == 2 + 2 * 2
    assert query(old, "select distinct file, document from sample_texts").fetchall() == [(None, None)]
    assert query(old, "from documents").fetchall() == []


def test_samples_before_scoring_can_be_searched(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = tmp_path / "x"
    shutil.copytree(run.folder, new, ignore=shutil.ignore_patterns("rounds"))
    assert main(["samples", str(new)]) == 1
    assert "no round has been scored yet" in capsys.readouterr().err
    assert main(["samples", str(new), "--where", "text like '%script>%'"]) == 0
    assert "<script>" in capsys.readouterr().out


def test_sql_has_texts_in_one_call(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    sql = (
        "select loss, sample_text(shard, sample) as text from (from losses where round = 1 order by loss desc limit 3)"
    )
    expected = [(sample.loss, sample.text) for sample in find_samples(run.folder, "hardest", 3).samples]
    assert query(str(run.folder), sql).fetchall() == expected
    assert main(["sql", str(run.folder), "select file, document, text from sample_texts limit 1"]) == 0
    assert ".jsonl" in capsys.readouterr().out
    assert main(["sql", str(run.folder), "select sample_text(0, 100000)"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "shard 0 has no sample 100000" in line


def test_documents_are_listed_by_their_place(run: Run) -> None:
    rows = query(run.folder, "select file, document, start from documents where source = 'b' order by start").fetchall()
    assert [Path(file).name for file, _, _ in rows] == ["b.jsonl"] * len(rows)
    assert rows[0][2] == 0
    numbers = [number for _, number, _ in rows]
    assert numbers == sorted(numbers) and len(numbers) in (20, 21)


def test_the_report_shows_examples_of_the_selection(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    decode_batch = HuggingFaceTokenizer.decode_batch

    def counting(self: HuggingFaceTokenizer, batch: list[list[int]]) -> list[str]:
        decoded.append(len(batch))
        return decode_batch(self, batch)

    monkeypatch.setattr(HuggingFaceTokenizer, "decode_batch", counting)
    rows = known(run)
    with open_ledger(run.folder) as ledger:
        found = selection_examples(run, ledger, 2)
    assert sum(decoded) == 15
    dropped = sorted((r for r in rows if r["reason"] == "not drawn"), key=lambda r: r["loss"])
    kept = sorted((r for r in rows if r["kept"]), key=lambda r: -r["loss"])
    outliers, contaminated = (
        sorted((r for r in rows if r["reason"] == reason), key=lambda r: -r["loss"])
        for reason in (OUTLIER, CONTAMINATED)
    )
    aside = [row for pair in zip(contaminated, outliers, strict=True) for row in pair]
    for group, expected in zip(found.values(), (dropped, kept, aside), strict=True):
        assert [(row[1], row[2]) for row in group] == identities(expected[: len(group)])
        assert all(".jsonl document " in row[5] for row in group)
        assert all(0 < len(row[6]) <= 301 for row in group)
    content = write_report(run, tmp_path / "page.html").read_text(encoding="utf-8")
    assert _Page(content).tags.count("script") == 0
    assert content.count("<details>") == 1
