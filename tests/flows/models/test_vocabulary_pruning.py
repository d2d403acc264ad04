"""`reprise tokenizer compact`: its files, its output, and the requests that it rejects."""

import html
import json
import random
import shutil
from pathlib import Path

import duckdb
import pytest

import flows.models.vocabulary_pruning
from data_scoring.config import TokenizerConfig
from data_scoring.corpus.corpus import Corpus
from data_scoring.tokenizer.tokenizer import install_tokenizer, open_tokenizer
from flows.cli.main import main
from flows.run.config import RunConfig, read_config
from flows.run.folder import open_run
from tests.conftest import make_documents
from trainer.checkpoint_folder import find_damage, list_checkpoints


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a tokenizer t.json of 500 tokens, and two sources, one of which it was not trained on."""
    install_tokenizer(TokenizerConfig(vocab_size=500), make_documents(300), 0, tmp_path)
    (tmp_path / "tokenizer.json").rename(tmp_path / "t.json")
    (tmp_path / "text").mkdir()
    for name, texts in (("words", make_documents(200, 1)), ("zh", ["一二三 the 四", "五 六 model"])):
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (tmp_path / "text" / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "c.yaml").write_text(
        f"name: run\noutput: {tmp_path}\ncorpus:\n  num_shards: 2\n  seq_length: 32\n  sources:\n"
        f"    - {{name: words, path: '{tmp_path}/text/words.jsonl'}}\nmodel: {{num_layers: 1, hidden_size: 64}}\n"
        f"tokenizer: {{path: '{tmp_path}/t.json'}}\n"
    )
    return tmp_path


def compact(place: Path, *options: str, corpus: str = "text", tokenizer: str = "t.json") -> int:
    command = ["tokenizer", "compact", "--tokenizer", str(place / tokenizer), "--corpus", str(place / corpus)]
    return main([*command, *options])


def test_a_tokenizer_is_cut_with_its_tables_and_page(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compact(place, "--coverage", "0.9", "--model", str(place / "c.yaml")) == 0
    printed = capsys.readouterr().out
    [folder] = place.glob("t-[0-9]*")
    size = int(folder.name.removeprefix("t-"))
    assert {path.name for path in folder.iterdir()} == {
        "tokenizer.json", "vocabulary.parquet", "counts.parquet", "curve.parquet", "dropped.tsv", "curves.png",
        "split.png", "report.html",
    }  # fmt: skip
    small, whole = open_tokenizer(folder / "tokenizer.json", None), open_tokenizer(place / "t.json", None)
    assert small.vocab_size == size
    rows = duckdb.query(
        f"select sum(count) filter (kept) / sum(count), count(*) filter (kept), max(new_id) "
        f"from '{folder / 'vocabulary.parquet'}'"
    ).fetchall()  # type: ignore[union-attr]
    assert rows[0][0] >= 0.9
    assert rows[0][1:] == (size, size - 1)
    totals = duckdb.query(
        f"select sum(by_source.words), sum(by_source.zh), sum(count) from '{folder / 'counts.parquet'}'"
    ).fetchall()[0]  # type: ignore[union-attr]
    texts = {"words": make_documents(200, 1), "zh": ["一二三 the 四", "五 六 model"]}
    tokens = {name: [sum(map(len, t.encode_batch(texts[name]))) for t in (whole, small)] for name in texts}
    assert totals == (tokens["words"][0], tokens["zh"][0], tokens["words"][0] + tokens["zh"][0])
    num_bytes = sum(len(text.encode()) for text in texts["words"])
    line = next(line for line in printed.splitlines() if line.startswith("| words"))
    assert f"{num_bytes / tokens['words'][0]:.4f} | {num_bytes / tokens['words'][1]:.4f}" in line
    # Embedding and head of 64 channels, of the parameters of the configuration's model.
    model = read_config(place / "c.yaml", []).model
    assert f"{2 * 64 * size / model.num_parameters(size):.2%}" in printed
    dropped = (folder / "dropped.tsv").read_text().splitlines()
    assert len(dropped) == 1 + 500 - size
    page = (folder / "report.html").read_text()
    assert "data:image/png;base64" in page
    assert "zh" in page
    # Counted once: the next size takes its counts from there.
    assert len(list((place / "t-counts").glob("zh.*.npz"))) == 1
    assert compact(place, "--vocab-size", "300", "--output", str(place / "out")) == 0
    assert open_tokenizer(place / "out" / "tokenizer.json", None).vocab_size == 300


def zipf_texts(count: int, seed: int) -> list[str]:
    """Return texts of 40 words out of 1,500, the r-th of which occurs in proportion to 1/r."""
    draw = random.Random(0)
    syllables = [a + b for a in "bcdfghklmnprstvz" for b in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(1500)]
    draw, weights = random.Random(seed), [1 / rank for rank in range(1, 1501)]
    return [" ".join(draw.choices(words, weights, k=40)) for _ in range(count)]


@pytest.fixture(scope="module")
def zipf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer t.json of 1,500 tokens, and two sources; the second is made of its rarer half."""
    folder = tmp_path_factory.mktemp("zipf")
    install_tokenizer(TokenizerConfig(vocab_size=1500), zipf_texts(800, 1), 0, folder)
    (folder / "tokenizer.json").rename(folder / "t.json")
    (folder / "text").mkdir()
    for name, texts in sources_of_zipf().items():
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (folder / "text" / f"{name}.jsonl").write_text("".join(lines))
    return folder


def sources_of_zipf() -> dict[str, list[str]]:
    texts = zipf_texts(330, 2)
    rare = [" ".join(sorted(text.split(), key=len)[-9:]) for text in texts[300:]]
    return {"all": texts[:300], "rare": rare}


@pytest.mark.parametrize(
    ("num_layers", "case"),
    [(1, "No size keeps the paper's rule"), (12, "outside of it, "), (16, "They keep the paper's rule")],
)
def test_the_recommended_size_keeps_the_paper_s_rule(
    num_layers: int, case: str, zipf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Coverage above 90 %, share below 20 %: against a search over the table of sizes."""
    (tmp_path / "m.yaml").write_text(
        "name: m\ncorpus: {sources: [{name: a, path: a.txt}]}\n"
        f"model: {{num_layers: {num_layers}, hidden_size: 64}}\n"
    )
    assert compact(zipf, "--model", str(tmp_path / "m.yaml"), "--output", str(tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    rows = duckdb.query(
        f"""select vocab_size, coverage, embedding_and_head_share, relative_length * parameters
        from '{tmp_path / "out" / "curve.parquet"}' where vocab_size % 128 = 0"""
    ).fetchall()  # type: ignore[union-attr]
    model = read_config(tmp_path / "m.yaml", []).model
    size = rows[3][0]
    assert rows[3][2] == pytest.approx(2 * 64 * size / model.num_parameters(size))
    within = [row for row in rows if row[1] > 0.9 and row[2] < 0.2]
    cheapest = min(rows, key=lambda row: row[3])
    expected = min(within, key=lambda row: row[3]) if within else next(row for row in rows if row[1] >= 0.9)
    assert open_tokenizer(tmp_path / "out" / "tokenizer.json", None).vocab_size == expected[0]
    assert printed.startswith(f"{expected[0]:,} tokens ")
    assert case in printed
    assert (expected == cheapest) is (case == "They keep the paper's rule")
    rules = {line.split("|")[1].strip(): line.split("|")[-2].strip() for line in printed.splitlines() if "|" in line}
    assert rules["after"] == ("kept" if within else "not its share")
    assert rules["cheapest to train"] == {1: "not its coverage and share", 12: "not its share", 16: "kept"}[num_layers]
    assert ("least within the rule" in rules) is bool(within)
    assert ("Warning: outside the paper's rule: embedding and head take " in printed) is (not within)
    assert "tokens cover" not in printed


def test_a_size_below_the_rule_is_a_warning_that_says_what_it_costs(
    zipf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--vocab-size", "512", "--model", "llama-30m", "--output", str(tmp_path / "out"))
    assert compact(zipf, *options) == 0
    printed = capsys.readouterr().out
    whole, small = (open_tokenizer(path, None) for path in (zipf / "t.json", tmp_path / "out" / "tokenizer.json"))
    longer = {}
    for name, texts in sources_of_zipf().items():
        before, after = (sum(map(len, each.encode_batch(texts))) for each in (whole, small))
        longer[name] = after / before - 1
    assert 0.1 < longer["all"] < longer["rare"]
    kept = duckdb.query(
        f"select sum(count) filter (kept) / sum(count) from '{tmp_path / 'out' / 'vocabulary.parquet'}'"
    ).fetchall()[0][0]  # type: ignore[union-attr]
    warning = (
        f"Warning: outside the paper's rule: 512 tokens cover {kept:.2%} of the corpus, not more than 90%: "
        f"text becomes {longer['all']:.1%} to {longer['rare']:.1%} longer, most of all rare, which costs as much more "
        "to train and to generate, and a sequence holds less text."
    )
    assert warning in printed
    assert html.escape(warning) in (tmp_path / "out" / "report.html").read_text()


def test_a_run_is_counted_as_it_lies_and_its_checkpoint_cut(
    place: Path, tiny_corpus: Corpus, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = open_run(RunConfig(name="run", output=str(place)))
    shutil.copytree(tiny_corpus.folder, run.corpus_folder)
    [checkpoint] = list_checkpoints(trained / "checkpoint")
    shutil.copytree(checkpoint, run.round_folder(1) / "checkpoint" / checkpoint.name)
    shutil.copy(tiny_corpus.tokenizer_path, place / "tiny.json")
    options = ("--vocab-size", "270", "--checkpoint", str(run.folder))
    assert compact(place, *options, corpus="run", tokenizer="tiny.json") == 0
    assert find_damage(place / "tiny-270" / "checkpoint" / checkpoint.name) is None
    assert "| one " in capsys.readouterr().out
    assert compact(place, *options, "--round", "2", corpus="run", tokenizer="tiny.json") == 1
    assert "round 2 does not have a checkpoint" in capsys.readouterr().err
    # The tokenizer of another corpus.
    assert compact(place, "--vocab-size", "300", corpus="run") == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {run.corpus_folder}: was tokenised with ")
    assert compact(place, "--checkpoint", str(checkpoint), corpus="c.yaml") == 1
    assert "its embedding has 384 rows for 300 tokens, but the tokenizer has 500; give the" in capsys.readouterr().err
    assert not list(place.glob("t-*"))
    # The token that ends documents is the one that the configuration names.
    text = (place / "c.yaml").read_text().replace("t.json'}", "t.json', end_of_document: the}")
    (place / "c.yaml").write_text(text)
    assert compact(place, "--vocab-size", "300", corpus="c.yaml") == 1
    assert "tokenizer.end_of_document: 'the' is not a token of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vocab-size", "100"], "size 100 is too small: 257 tokens are required (1 added token, 256 alphabet)"),
        (["--vocab-size", "501"], "vocabulary size 501 is more than the tokenizer's 500; give less"),
        (["--coverage", "97.86"], "--coverage: 97.86 is not above 0 and at most 1; give a share such as 0.9786"),
        (["--coverage", "0"], "--coverage: 0.0 is not above 0"),
        (["--model", "gpt-9"], "--model: 'gpt-9' is neither a configuration (.yaml) nor a preset"),
        (["--round", "1"], "--round: needs --checkpoint RUN"),
        (["--checkpoint", "nowhere"], "nowhere: not an intact checkpoint (it has no reprise.json)"),
        (["--end-of-document", "<end>"], "'<end>' is not a token of"),
        (["--output", "."], ".: already exists; delete it, or name another folder with --output"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line_and_nothing_is_written(
    place: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(place.rglob("*"))
    assert compact(place, *options) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert sorted(place.rglob("*")) == before


def test_what_fails_while_it_is_written_leaves_the_counts_alone(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("broken")

    monkeypatch.setattr(flows.models.vocabulary_pruning, "_write_tables", fail)
    assert compact(place, "--vocab-size", "300") == 1
    assert capsys.readouterr().err.endswith("error: broken\n")
    assert sorted(path.name for path in place.iterdir()) == ["c.yaml", "t-counts", "t.json", "text"]


def test_size_and_coverage_do_not_go_together(place: Path) -> None:
    with pytest.raises(SystemExit):
        compact(place, "--vocab-size", "300", "--coverage", "0.9")
