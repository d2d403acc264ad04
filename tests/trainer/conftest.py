"""What two ranks find out, in one launch for all tests."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from data_scoring.corpus import Corpus
from tests.trainer.two_ranks import work
from trainer.checkpoint_folder import list_checkpoints


@pytest.fixture(scope="session")
def found(
    tiny_corpus: Corpus, hugging_face: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    folder: Path = tmp_path_factory.mktemp("two-ranks")
    checkpoint = list_checkpoints(trained / "checkpoint")[-1]
    torch.multiprocessing.spawn(work, args=(folder, tiny_corpus.folder, hugging_face, checkpoint), nprocs=2)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(2)]
