"""Fixtures: the results of two ranks, from one launch shared by all tests."""

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from data_scoring.corpus.corpus import Corpus
from tests.trainer.two_ranks import work
from trainer.checkpoint_folder import list_checkpoints


@pytest.fixture(scope="session")
def found(
    tiny_corpus: Corpus, hugging_face: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What each of two ranks found; where tests run in several processes, the first that asks launches them for all."""
    base: Path = tmp_path_factory.getbasetemp()
    # Processes of pytest-xdist have folders of their own in a common one.
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "two-ranks"
    with FileLock(f"{folder}.lock"):
        if not (folder / "1.pickle").exists():
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "rendezvous").mkdir(parents=True)
            checkpoint = list_checkpoints(trained / "checkpoint")[-1]
            torch.multiprocessing.spawn(work, args=(folder, tiny_corpus.folder, hugging_face, checkpoint), nprocs=2)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(2)]


@pytest.fixture(scope="session")
def left(found: list[dict[str, Any]]) -> Path:
    """The folder of what jobs in bfloat16 left: `tests.trainer.two_ranks_bfloat16` says which."""
    return Path(found[0]["bfloat16"])
