"""A run folder with a model that was really trained, as its first round, without records of stages."""

from pathlib import Path

from data_scoring.corpus.corpus import Corpus
from flows.run.config import parse_config
from flows.run.folder import Run, open_run
from tests.conftest import TINY_MODEL


def make_run(parent: Path, corpus: Corpus, trained: Path) -> Run:
    """Return a run in a new folder in `parent`, with the model of the folder of a round `trained`."""
    fields = {
        "name": "tiny",
        "output": str(parent),
        "corpus": {"sources": [{"name": "one", "path": "x"}], "seq_length": corpus.seq_length, "num_shards": 3},
        "model": TINY_MODEL.model_dump(),
        "train": {"precision": "float32"},
    }
    run = open_run(parse_config(fields, "test"))
    (run.folder / "corpus").symlink_to(corpus.folder)
    (run.folder / "rounds" / "1").mkdir(parents=True)
    (run.folder / "rounds" / "1" / "checkpoint").symlink_to(trained / "checkpoint")
    return run
