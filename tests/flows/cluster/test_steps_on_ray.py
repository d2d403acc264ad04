"""What data steps write on a Ray cluster is what one process writes, whatever its nodes, and whichever is lost."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_scoring.base.engine import Engine, LocalEngine
from data_scoring.base.progress import silent
from data_scoring.config import CorpusConfig, SourceConfig, TokenizerConfig
from data_scoring.contamination import overlaps
from data_scoring.corpus import source_parts, token_counts
from data_scoring.corpus.corpus import Corpus
from data_scoring.corpus.prepare_corpus import prepare_corpus
from data_scoring.corpus.reading_order import ReadingOrder
from data_scoring.corpus.source_token_counts import count_sources
from data_scoring.corpus.token_counts import SourceCounts, count_corpus
from data_scoring.corpus.tokenise import TokenizerFile
from data_scoring.refine import policies
from data_scoring.refine.near_duplicates import write_near_duplicates
from data_scoring.refine.refine_shards import mix_selection, refine
from tests.conftest import make_documents
from tests.data_scoring.contamination import test_contaminated_samples as contamination
from tests.data_scoring.corpus.test_prepare_parts import TOKENIZER, write_text
from tests.data_scoring.refine import test_engines as refining
from tests.data_scoring.refine.loss_per_root_token import LOSS_PER_ROOT_TOKEN
from tests.data_scoring.refine.test_near_duplicates import cut_finely, prepare_repetitive
from tests.flows.cluster.lossy_engine import LossyEngine, open_on
from tests.ray_cluster import RayCluster


class Inputs:
    """What the steps read, in a folder."""

    def __init__(self, folder: Path, tiny_corpus: Corpus) -> None:
        for name in ("text", "repetitive", "noisy", "facts", "in-place"):
            (folder / name).mkdir()
        self.tiny_corpus = tiny_corpus
        self.text: CorpusConfig = write_text(folder / "text")
        self.repetitive = prepare_repetitive(folder / "repetitive")
        self.noisy, texts = contamination.prepare_noisy(folder / "noisy")
        self.in_place = contamination.in_place(self.noisy, folder / "in-place")
        self.items = contamination.draw_items(texts)
        self.facts = refining.write_facts(folder / "facts")
        path = folder / "counted.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_documents(1000)))
        self.counted = SourceConfig(name="counted", path=str(path))


def prepare(inputs: Inputs, folder: Path, engine: Engine) -> None:
    prepare_corpus(inputs.text, TOKENIZER, 5, folder, "f", silent, engine)


def prepare_in_place(inputs: Inputs, folder: Path, engine: Engine) -> None:
    corpus = inputs.in_place.corpus
    sources = tuple(SourceConfig(name=name, path=str(corpus.folder.parent / name), format="megatron") for name in "xy")
    config = CorpusConfig(sources=sources, seq_length=15, num_shards=3, validation_fraction=0.1)
    tokenizer = TokenizerConfig(path=str(corpus.tokenizer_path))
    prepare_corpus(config, tokenizer, 5, folder, "f", silent, engine)


def find_near_duplicates(inputs: Inputs, folder: Path, engine: Engine) -> None:
    write_near_duplicates(inputs.repetitive, 0.8, folder / "near.parquet", 1.0, engine, silent)


def find_contamination(inputs: Inputs, folder: Path, engine: Engine) -> None:
    copy = shutil.copytree(inputs.noisy.corpus.folder, folder / "corpus")
    contamination.write(ReadingOrder(Corpus(copy), inputs.noisy.seed), inputs.items, 5, engine)


def count_a_corpus(inputs: Inputs, folder: Path, engine: Engine) -> None:
    save(count_corpus(inputs.tiny_corpus, 0, folder, engine, silent), folder)


def count_a_source(inputs: Inputs, folder: Path, engine: Engine) -> None:
    file = TokenizerFile(inputs.tiny_corpus.tokenizer_path, None, "t")
    save(count_sources([inputs.counted], file, folder, True, engine, silent), folder)


def save(found: list[SourceCounts], folder: Path) -> None:
    for source in found:
        assert source.counts.any()
        np.save(folder / f"{source.name}.npy", source.counts)


def select(inputs: Inputs, folder: Path, engine: Engine, case: str, within: str) -> None:
    """Select and mix, with outliers left out."""
    shutil.copytree(inputs.facts, folder, dirs_exist_ok=True)
    draw = refining.draw_for(folder, case, within)
    refine(draw, "refined", engine, silent)
    mix_selection(draw.target / "mix.parquet", draw, folder / "samples.parquet")


Step = Callable[[Inputs, Path, Engine], None]
STEPS: dict[str, Step] = {
    "prepare": prepare,
    "prepare in place": prepare_in_place,
    "near duplicates": find_near_duplicates,
    "contamination": find_contamination,
    "counts of a corpus": count_a_corpus,
    "counts of a source": count_a_source,
    "batches within parts": partial(select, case="batches", within="part"),
}
# What takes as many maps, or fewer.
MORE: dict[str, Step] = {
    f"{case} within {within}s": partial(select, case=case, within=within)
    for case, within in (
        ("loss", "shard"), ("top", "part"), ("excess", "shard"), ("guards", "part"), ("guards", "shard"),
        ("weights", "part"), ("batches", "shard"), ("late", "part"), ("own policy", "shard"),
    )
}  # fmt: skip
ALL = {**STEPS, **MORE}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Corpus) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("inputs"), tiny_corpus)


@pytest.fixture(autouse=True)
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have little data cut into many parts, which is done in this process, and know a policy that was added here."""
    monkeypatch.setattr(source_parts, "_SMALLEST_PART_BYTES", 12_000)
    monkeypatch.setattr(overlaps, "_PART_TOKENS", 2000)
    monkeypatch.setattr(token_counts, "_LEAST_TOKENS", 20 * 32)
    cut_finely(monkeypatch)
    monkeypatch.setitem(policies.POLICIES, LOSS_PER_ROOT_TOKEN.name, LOSS_PER_ROOT_TOKEN)
    monkeypatch.setitem(refining.CASES, "own policy", {"policy": LOSS_PER_ROOT_TOKEN.name})


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, bytes]]:
    """What one process writes, by step."""
    return {}


def written(name: str, inputs: Inputs, folder: Path, engine: AbstractContextManager[Engine]) -> dict[str, bytes]:
    """Return the content of all files that a step has left in `folder`."""
    folder.mkdir()
    with engine as opened:
        ALL[name](inputs, folder, opened)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def written_here(name: str, inputs: Inputs, folder: Path, expected: dict[str, dict[str, bytes]]) -> dict[str, bytes]:
    """Return the content of all files that a step leaves that runs in this process."""
    if name not in expected:
        expected[name] = written(name, inputs, folder, LocalEngine(1))
    return expected[name]


OpenEngine = Callable[[Path], AbstractContextManager[Engine]]


@pytest.fixture(scope="module")
def pool() -> Iterator[Engine]:
    """Two processes, whose start would take longer than the steps do."""
    with LocalEngine(2) as engine:
        yield engine


@pytest.fixture
def open_any(request: pytest.FixtureRequest) -> OpenEngine:
    """Opens the engine of a kind."""
    if request.param == "2 processes":
        pool: Engine = request.getfixturevalue("pool")
        return lambda folder: nullcontext(pool)
    joined: RayCluster = request.getfixturevalue("joined")
    joined.resize(int(request.param[0]))
    return lambda folder: open_on(joined, folder)


# What differs most, on any number of nodes, and the other steps on one of them each, in turn.
ON_ANY = ("prepare", "near duplicates", "contamination", "batches within parts")
KINDS = ("2 processes", "1 node", "2 nodes", "3 nodes")


def cases() -> Iterator[Any]:
    """Yield all pairs of engine and step; only those above are tested by default, and all steps on two processes."""
    for kind in KINDS:
        for number, name in enumerate(ALL):
            is_quick = kind == "2 processes" or name in ON_ANY or kind == KINDS[1 + number % 3]
            yield pytest.param(kind, name, marks=() if is_quick else pytest.mark.slow)


@pytest.mark.parametrize(("open_any", "name"), cases(), indirect=["open_any"])
def test_processes_and_nodes_change_nothing(
    open_any: OpenEngine, name: str, inputs: Inputs, tmp_path: Path, expected: dict[str, dict[str, bytes]]
) -> None:
    here = written_here(name, inputs, tmp_path / "here", expected)
    assert written(name, inputs, tmp_path / "there", open_any(tmp_path)) == here


@pytest.mark.parametrize(
    ("name", "in_writing"),
    [*((name, True) for name in STEPS), ("counts of a corpus", False), ("counts of a source", False)],
)
def test_a_node_that_is_lost_in_each_map_changes_nothing_and_leaves_nothing(
    joined: RayCluster,
    name: str,
    in_writing: bool,
    inputs: Inputs,
    tmp_path: Path,
    expected: dict[str, dict[str, bytes]],
) -> None:
    here = written_here(name, inputs, tmp_path / "here", expected)
    engine = LossyEngine(joined, tmp_path / "marks", in_writing)
    files = written(name, inputs, tmp_path / "there", engine)
    assert max(engine.num_parts) > 2
    assert not [path for path in files if "/." in f"/{path}"]
    assert files == here
