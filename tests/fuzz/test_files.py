"""Whatever is in a file that people give or a run has written: one line of error that names it, or its content."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import strategies as st

from data_scoring.base.parquet import parquet_fingerprint, read_parquet, write_parquet
from data_scoring.config import SourceConfig
from data_scoring.corpus.corpus import Corpus
from data_scoring.corpus.indexed import open_indexed
from data_scoring.corpus.sources import Rejects, read_documents
from data_scoring.evaluation.items import read_items
from data_scoring.losses.origin import read_origin, with_origin
from data_scoring.sandboxed_query import ask
from data_scoring.tokenizer.tokenizer import open_tokenizer
from tests.conftest import ORIGIN, make_documents
from tests.evaluation_data import write_items
from tests.fuzz.cases import check_message, numbers_of_cases, run_cases
from tests.fuzz.configurations import mutated


def _documents(path: Path) -> list[str]:
    source = SourceConfig(name="a", path=str(path))
    return list(read_documents(source, Rejects(path.with_name("rejects"), skip=False)))


def _sequences(path: Path) -> list[Any]:
    tokens = open_indexed(path.with_suffix(""))
    return [tokens.sequence(index) for index in range(len(tokens.lengths))]


# What reads each file, by its path; the fuzz of sources in Parquet is that of their library.
READERS: dict[str, Callable[[Path], Any]] = {
    "text.jsonl": _documents,
    "text.jsonl.gz": _documents,
    "text.txt": _documents,
    "shard.idx": _sequences,
    "shard.bin": _sequences,
    "tokenizer.json": lambda path: open_tokenizer(path, "<|endoftext|>").encode_batch(["a model"]),
    "items/hellaswag.jsonl": lambda path: read_items("hellaswag", path.parent),
    "items/ceval.jsonl": lambda path: read_items("ceval", path.parent),
    "run/rounds/1/mix.parquet": lambda path: (
        ask(path.parents[2], "from mix", 5).fetchall(), read_parquet(path), parquet_fingerprint(path),
    ),
    "run/rounds/1/losses/shard=0000.parquet": lambda path: (
        ask(path.parents[3], "from losses", 5).fetchall(), read_parquet(path), read_origin(path),
    ),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, tiny_corpus: Corpus) -> Path:
    """A folder with a file of every kind."""
    texts = make_documents(4)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (tmp_path / "text.jsonl").write_bytes(lines)
    (tmp_path / "text.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "text.txt").write_text("\n\n".join(texts))
    for ending in (".bin", ".idx"):
        (tmp_path / f"shard{ending}").write_bytes((tiny_corpus.folder / f"validation{ending}").read_bytes())
    (tmp_path / "tokenizer.json").write_bytes(tiny_corpus.tokenizer_path.read_bytes())
    write_items(tmp_path / "items")
    rows = {"shard": pa.array([0, 0], pa.int32()), "sample": pa.array([1, 0], pa.int32())}
    write_parquet(tmp_path / "run/rounds/1/mix.parquet", pa.table(rows), "f")
    losses = {"sample": pa.array([0, 1], pa.int32()), "num_tokens": pa.array([3, 4], pa.int32())}
    table = pa.table({**losses, "source": ["a", "b"], "loss": pa.array([1.5, 2.5], pa.float32())})
    write_parquet(tmp_path / "run/rounds/1/losses/shard=0000.parquet", with_origin(table, ORIGIN), "f")
    return tmp_path


@pytest.mark.parametrize("name", READERS)
@numbers_of_cases(15)
def test_files(folder: Path, name: str, num_cases: int) -> None:
    path, read = folder / name, READERS[name]
    intact = path.read_bytes()
    read(path)

    @st.composite
    def contents(draw: st.DrawFn) -> bytes:
        return mutated(draw, intact)

    def check(content: bytes) -> None:
        path.write_bytes(content)
        try:
            read(path)
        except ValueError as error:
            # DuckDB does not name the file of some damages.
            check_message(error, path.name, path.stem, path.parent.name, "`reprise verify RUN` finds damaged files")

    # The many cases are divided among the files.
    run_cases(contents(), check, num_cases if num_cases < 100 else num_cases // len(READERS))
