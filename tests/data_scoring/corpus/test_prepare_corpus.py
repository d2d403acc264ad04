"""From text to shards: nothing lost, nothing doubled, sources apart, bounded memory, existing corpora untouched."""

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer as BytePairs

from data_scoring.base.files import fingerprint
from data_scoring.base.progress import silent
from data_scoring.config import CorpusConfig, TokenizerConfig
from data_scoring.corpus import sources
from data_scoring.corpus.corpus import VALIDATION, Corpus
from data_scoring.corpus.indexed import write_index
from data_scoring.corpus.prepare_corpus import prepare_corpus
from data_scoring.tokenizer.tokenizer import open_tokenizer
from tests.conftest import make_documents


def prepare(
    folder: Path, sources: list[dict[str, object]], tokenizer: TokenizerConfig, seed: int = 5, **options: object
) -> Corpus:
    config = CorpusConfig.model_validate({"sources": sources, "seq_length": 16, "num_shards": 4, **options})
    prepare_corpus(config, tokenizer, seed, folder, "fingerprint", silent)
    return Corpus(folder)


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("\n".join(json.dumps({"text": document}, ensure_ascii=False) for document in documents))
    return path


def read_all(corpus: Corpus, shard: int) -> list[list[int]]:
    count = corpus.num_samples(shard)
    batch = corpus.read(np.full(count, shard), np.arange(count))
    return [row[: length + 1].tolist() for row, length in zip(batch.tokens, batch.num_tokens.tolist(), strict=True)]


def split_documents(sequences: list[list[int]], end: int) -> set[tuple[int, ...]]:
    """Return the whole documents inside sequences (those between two ends of document)."""
    inner = set()
    for sequence in sequences:
        ends = [place for place, token in enumerate(sequence) if token == end]
        inner |= {tuple(sequence[a + 1 : b]) for a, b in pairwise(ends)}
    return inner


def test_every_document_is_there_once_and_validation_is_apart(tmp_path: Path) -> None:
    documents = make_documents(300, 1)
    path = write_jsonl(tmp_path / "a.jsonl", [*documents[:200], *documents[50:60], "   ", *documents[200:]])
    other = tmp_path / "b.txt"
    other.write_text("\n\n".join([*make_documents(80, 2), documents[0]]))
    corpus = prepare(
        tmp_path / "corpus",
        [{"name": "a", "path": str(path)}, {"name": "b", "path": str(other), "document": "paragraph"}],
        TokenizerConfig(vocab_size=300),
    )
    a, b = corpus.manifest["sources"]
    assert (a["documents"], a["duplicates"], a["empty"], b["documents"], b["duplicates"]) == (310, 10, 1, 81, 1)
    sizes = [corpus.num_samples(shard) for shard in range(4)]
    assert max(sizes) - min(sizes) <= 1

    tokenizer = open_tokenizer(corpus.tokenizer_path, None)
    encoded = {
        name: [[*ids, tokenizer.end_of_document] for ids in tokenizer.encode_batch(texts)]
        for name, texts in (("a", documents), ("b", make_documents(80, 2)))
    }
    samples = pq.read_table(corpus.samples_path).to_pylist()
    train = {name: [] for name in encoded}
    for row in samples:
        [sequence] = [read_all(corpus, row["shard"])[row["sample"]]]
        assert len(sequence) - 1 == row["num_tokens"]
        train[row["source"]].append(sequence)
    held_out = dict.fromkeys(encoded, 0)
    validation = {name: [] for name in encoded}
    for sequence, source in zip(read_all(corpus, VALIDATION), corpus.validation_sources, strict=True):
        validation[source].append(sequence)
    for name, expected in encoded.items():
        total = sum(map(len, expected))
        found = [token for sequence in [*train[name], *validation[name]] for token in sequence]
        # A last sample of a single token predicts nothing and is left out: at most one for each of the two streams.
        assert total - 2 <= len(found) <= total
        assert (
            np.abs(
                np.bincount(found, minlength=300)
                - np.bincount([token for document in expected for token in document], minlength=300)
            ).sum()
            <= 2
        )
        held_out[name] = sum(map(len, validation[name]))
        whole = {tuple(document[:-1]) for document in expected}
        assert (
            split_documents([[token for sequence in validation[name] for token in sequence]], tokenizer.end_of_document)
            <= whole
        )
    assert a["validation_documents"] + b["validation_documents"] > 5
    assert held_out["a"] >= a["validation_tokens"] - 1


@pytest.mark.parametrize(("seed", "lost"), [(5, "none of its text is held out"), (6, "all of its text is held out")])
def test_a_source_without_validation_or_training_text_has_a_note(seed: int, lost: str, tmp_path: Path) -> None:
    """The only document of a source is either trained on or held out."""
    paths = {
        name: write_jsonl(tmp_path / f"{name}.jsonl", make_documents(count, count))
        for name, count in (("many", 30), ("one", 1))
    }
    corpus = prepare(
        tmp_path / "corpus",
        [{"name": name, "path": str(path)} for name, path in paths.items()],
        TokenizerConfig(vocab_size=257),
        seed,
        validation_fraction=0.5,
    )
    [note] = corpus.notes
    assert note.startswith(f"corpus.sources.one: {lost}")


def test_the_result_depends_on_the_seed_alone(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", make_documents(100))
    sources: list[dict[str, object]] = [{"name": "a", "path": str(path)}]
    one, two = (prepare(tmp_path / name, sources, TokenizerConfig(vocab_size=280)) for name in ("one", "two"))
    assert one.manifest == two.manifest
    assert (tmp_path / "one" / "shard-0000.bin").read_bytes() == (tmp_path / "two" / "shard-0000.bin").read_bytes()


def test_files_are_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(write_jsonl(tmp_path / f"{name}.jsonl", make_documents(100))) for name in "ab"]
    listed: list[str] = []

    def match(path: str) -> list[str]:
        listed.append(path)
        return [path]

    monkeypatch.setattr(sources, "match_path", match)
    named: list[dict[str, object]] = [{"name": Path(path).stem, "path": path} for path in paths]
    prepare(tmp_path / "corpus", named, TokenizerConfig(vocab_size=280))
    assert listed == paths


def test_an_existing_megatron_corpus_is_used_in_place(tmp_path: Path) -> None:
    text = prepare(
        tmp_path / "text",
        [{"name": "a", "path": str(write_jsonl(tmp_path / "a.jsonl", make_documents(60)))}],
        TokenizerConfig(vocab_size=280),
    )
    generator = np.random.default_rng(0)
    streams = {}
    for name, lengths in (("wiki", [40, 33, 500]), ("code", [100, 7])):
        tokens = generator.integers(0, 280, sum(lengths)).astype(np.uint16)
        (tmp_path / f"{name}.bin").write_bytes(tokens.tobytes())
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]) * 2
        write_index(tmp_path / f"{name}.idx", tokens.dtype, len(lengths), [(np.array(lengths), starts)])
        streams[name] = tokens.tolist()
    corpus = prepare(
        tmp_path / "corpus",
        [{"name": name, "path": str(tmp_path / name)} for name in streams],
        TokenizerConfig(path=str(text.tokenizer_path)),
        validation_fraction=0.1,
    )
    for part in (tmp_path / "corpus").glob("*.bin"):
        assert part.is_symlink()
    windows = {
        name: [tokens[start : start + 17] for start in range(0, len(tokens), 17) if len(tokens[start : start + 17]) > 1]
        for name, tokens in streams.items()
    }
    found: dict[str, list[list[int]]] = {name: [] for name in streams}
    for row in pq.read_table(corpus.samples_path).to_pylist():
        found[row["source"]].append(read_all(corpus, row["shard"])[row["sample"]])
    for sequence, source in zip(read_all(corpus, VALIDATION), corpus.validation_sources, strict=True):
        found[source].append(sequence)
    assert corpus.num_validation_samples == 4
    assert {name: sorted(rows) for name, rows in found.items()} == {
        name: sorted(rows) for name, rows in windows.items()
    }


def test_parquet_and_saved_datasets_are_read(tmp_path: Path) -> None:
    import datasets

    documents = make_documents(40)
    pq.write_table(pa.table({"body": documents}), tmp_path / "a.parquet")
    datasets.Dataset.from_dict({"text": make_documents(30, 9)}).save_to_disk(str(tmp_path / "saved"))
    corpus = prepare(
        tmp_path / "corpus",
        [
            {"name": "a", "path": str(tmp_path / "*.parquet"), "text_field": "body"},
            {"name": "b", "path": str(tmp_path / "saved"), "format": "datasets", "max_documents": 25},
        ],
        TokenizerConfig(vocab_size=280),
    )
    assert [source["documents"] for source in corpus.manifest["sources"]] == [40, 25]


def test_bad_records_are_skipped_counted_and_listed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = [json.dumps({"text": document}).encode() for document in make_documents(60)]
    bad = [b'{"text": ', b'{"title": "x"}', b'{"text": 7}', b'{"text": "\xff"}', b'{"text": "\\ud800"}', b"[1]"]
    path.write_bytes(b"\n".join([good[0], *bad, b"", *good[1:]]))
    corpus = prepare(
        tmp_path / "corpus",
        [{"name": "a", "path": str(path)}],
        TokenizerConfig(vocab_size=280),
        on_bad_record="skip",
    )
    [source] = corpus.manifest["sources"]
    assert (source["documents"], source["rejected"]) == (60, 6)
    rejects = [json.loads(line) for line in (tmp_path / "corpus" / "rejects.jsonl").read_text().splitlines()]
    assert [(reject["file"], reject["line"]) for reject in rejects] == [(str(path), line) for line in range(2, 8)]


def not_json(folder: Path) -> None:
    (folder / "a.jsonl").write_text('{"text": "one"}\n{"text": \n')


def not_utf8(folder: Path) -> None:
    (folder / "a.jsonl").write_bytes(b'{"text": "one"}\n\n{"text": "caf\xe9"}\n')


def no_field(folder: Path) -> None:
    (folder / "a.jsonl").write_text('{"title": "one"}\n')


def empty(folder: Path) -> None:
    (folder / "a.jsonl").write_text("\n\n")


def one_document(folder: Path) -> None:
    (folder / "a.jsonl").write_text('{"text": "one"}\n{"text": "one"}\n')


def too_little(folder: Path) -> None:
    (folder / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, r"corpus.sources.a.path: no file matches '.*a.jsonl'; check the path"),
        (not_json, r"a.jsonl:2: not valid JSON .* at column 10\); repair the line, or set corpus.on_bad_record: skip"),
        (not_utf8, r"a.jsonl:3: not UTF-8 \(byte 0xe9 at column 14\); convert the file"),
        (no_field, r"a.jsonl:1: no field 'text'; set text_field"),
        (empty, r"corpus.sources.a.path: has no text"),
        (one_document, r"fewer than two distinct documents"),
        (too_little, r"only 1 training samples of 16 tokens for 4 shards; add text, or lower corpus.seq_length"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    make(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        prepare(
            tmp_path / "corpus", [{"name": "a", "path": str(tmp_path / "a.jsonl")}], TokenizerConfig(vocab_size=280)
        )
    assert "\n" not in str(error.value)
    assert not (tmp_path / "corpus" / "manifest.json").exists()
    assert not list((tmp_path / "corpus").glob("shard-*"))


@pytest.mark.parametrize(("name", "content"), [
    ("a.jsonl.gz", b"no gzip"), ("a.parquet", b"PAR1"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "one"}\n' * 1000, mtime=0)[:-12]),
])  # fmt: skip
def test_a_file_that_is_not_what_its_name_says_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"corpus.sources.a.path: '.*{name}' cannot be read"):
        prepare(tmp_path / "corpus", [{"name": "a", "path": str(tmp_path / name)}], TokenizerConfig(vocab_size=280))


def test_held_out_text_is_the_same_for_every_tokenizer(tmp_path: Path) -> None:
    documents = [f"{document} é" for document in make_documents(300, 1)]
    path = write_jsonl(tmp_path / "a.jsonl", [*documents, *documents[:60]])
    sources: list[dict[str, object]] = [{"name": "a", "path": str(path)}]
    num_bytes = set()
    for vocab_size in (280, 400):
        corpus = prepare(tmp_path / str(vocab_size), sources, TokenizerConfig(vocab_size=vocab_size))
        [part] = corpus.parts(VALIDATION)
        tokens = np.concatenate([part.sequence(number) for number in range(len(part.lengths))])
        # A byte-level tokenizer gives back the text.
        tokenizer = BytePairs.from_file(str(corpus.tokenizer_path))
        text = tokenizer.decode(tokens.tolist(), skip_special_tokens=True).encode()
        num_documents = int((tokens == corpus.manifest["end_of_document"]).sum())
        assert num_documents == corpus.manifest["sources"][0]["validation_documents"] > 5
        assert corpus.held_out_text == {"a": (len(tokens), len(text))}
        assert corpus.bits_per_byte("a", 2.0) == pytest.approx(2 / np.log(2) * len(tokens) / len(text))
        others = {key: value for key, value in corpus.manifest.items() if key not in ("files", "validation_bytes")}
        assert corpus.fingerprint == fingerprint(others)
        num_bytes.add(len(text))
    assert len(num_bytes) == 1
    # Corpora of earlier versions do not say.
    manifest = tmp_path / "280" / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["validation_bytes"], content["record_checksum"]
    manifest.write_text(json.dumps(content))
    assert (Corpus(manifest.parent).held_out_text, Corpus(manifest.parent).bits_per_byte("a", 2.0)) == ({}, None)


def test_text_that_is_not_utf8_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo \xff\n")
    for document, line in (("file", 2), ("line", 2), ("paragraph", 1)):
        sources: list[dict[str, object]] = [{"name": "a", "path": str(tmp_path / "a.txt"), "document": document}]
        with pytest.raises(ValueError, match=rf"a.txt:{line}: not UTF-8"):
            prepare(tmp_path / "corpus", sources, TokenizerConfig(vocab_size=280))


def test_mixing_text_with_an_existing_corpus_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", make_documents(60))
    (tmp_path / "b.bin").write_bytes(b"\0\0")
    write_index(tmp_path / "b.idx", np.dtype(np.uint16), 1, [(np.array([1]), np.array([0]))])
    sources: list[dict[str, object]] = [{"name": "a", "path": str(path)}, {"name": "b", "path": str(tmp_path / "b")}]
    with pytest.raises(ValueError, match="cannot be mixed with text"):
        prepare(tmp_path / "corpus", sources, TokenizerConfig(vocab_size=280))


MEASURE = """
import resource, sys

from pathlib import Path
from data_scoring.config import CorpusConfig, SourceConfig, TokenizerConfig
from data_scoring.corpus.prepare_corpus import prepare_corpus
from data_scoring.base.progress import silent
source = SourceConfig(name="a", path=sys.argv[1])
corpus = CorpusConfig(sources=(source,), seq_length=16)
prepare_corpus(corpus, TokenizerConfig(vocab_size=280, train_megabytes=0.1), 0, Path(sys.argv[2]), "f", silent)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def peak_bytes(folder: Path, copies: int, lines: list[str]) -> int:
    path = folder / f"{copies}.jsonl"
    with path.open("w") as file:
        for copy in range(copies):
            file.writelines(line.replace("COPY", str(copy)) for line in lines)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE, str(path), str(folder / str(copies))],
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path.cwd()), "MALLOC_ARENA_MAX": "1", "TOKENIZERS_PARALLELISM": "true"},
    )
    return int(done.stdout)


def test_peak_memory_does_not_grow_beyond_sixteen_bytes_a_document(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"COPY {document}"[:80]}) + "\n" for document in make_documents(10_000)]
    small, large = peak_bytes(tmp_path, 4, lines), peak_bytes(tmp_path, 24, lines)
    print(f"{(large - small) / 200_000:.1f} bytes a document")
    # Over sizes that vary by 18 MB of text, peaks vary by up to 13 MB with the allocator's moods.
    assert large - small < 16 * 200_000 + (16 << 20)
