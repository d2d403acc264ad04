"""Fixtures: the results of two ranks, from one launch shared by all tests."""

from pathlib import Path
from typing import Any

import pytest

from data_scoring.corpus.corpus import Corpus
from tests.conftest import MakeOnce
from tests.forked_ranks import read_found, run_ranks
from tests.trainer.two_ranks import work
from trainer.checkpoint_folder import list_checkpoints


@pytest.fixture(scope="session")
def found(tiny_corpus: Corpus, hugging_face: Path, trained: Path, make_once: MakeOnce) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    checkpoint = list_checkpoints(trained / "checkpoint")[-1]

    def work_together(folder: Path) -> None:
        (folder / "rendezvous").mkdir()
        run_ranks(work, folder, tiny_corpus.folder, hugging_face, checkpoint, num_ranks=2)

    folder = make_once("two-ranks", work_together)
    return read_found(folder, 2)


@pytest.fixture(scope="session")
def left(found: list[dict[str, Any]]) -> Path:
    """The folder of what jobs in bfloat16 left: `tests.trainer.two_ranks_bfloat16` says which."""
    return Path(found[0]["bfloat16"])
