"""What the metadata of a checkpoint may call while it is read."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItemType

from trainer.pickles import check_pickles


class Attribute:
    """Is pickled as Python 3.11.0 to 3.11.3 do members of enumerations: by getattr."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return getattr, self.arguments


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.save({}, tmp_path / "common.pt")
    return tmp_path


def test_members_of_enumerations_may_be_written_by_every_python(checkpoint: Path) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps([WriteItemType.SHARD, Attribute(WriteItemType, "SHARD")]))
    check_pickles(checkpoint)


@pytest.mark.parametrize(
    "attribute",
    [
        Attribute(Metadata, "__init__"),
        Attribute(Attribute(Metadata, "__init__"), "__globals__"),
        Attribute("", "format"),
    ],
    ids=["method", "globals", "text"],
)
def test_other_attributes_are_refused(checkpoint: Path, attribute: Attribute) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(attribute))
    with pytest.raises(ValueError, match=r"refused, because loading it would call builtins\.getattr; it was not writ"):
        check_pickles(checkpoint)


@pytest.mark.parametrize("name", ["mro", "__class__", "nowhere", 3])
def test_what_is_no_member_is_malformed(checkpoint: Path, name: Any) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Attribute(WriteItemType, name)))
    with pytest.raises(ValueError, match="not the metadata of a checkpoint"):
        check_pickles(checkpoint)
