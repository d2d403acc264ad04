"""Pickles in checkpoints: they may describe tensors and plain values, and must not be able to do anything else."""

import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch

_REMEDY = "it was not written by Reprise; delete the checkpoint, or restore it from where you trust it"

# What torch's description of a distributed checkpoint is made of; none of these does anything when it is called.
_ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    *(
        ("torch.distributed.checkpoint.planner", name)
        for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    ),
}
_MALFORMED = (pickle.UnpicklingError, EOFError, AttributeError, ImportError, LookupError, TypeError, ValueError)


class _RefusedError(Exception):
    """A pickle asks for something that is not on the list."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _ALLOWED:
            raise _RefusedError(f"{module}.{name}")
        return super().find_class(module, name)


def allow_plain_pickles_only() -> None:
    """Make every `torch.load` of this process refuse what is not tensors and plain values, whatever it is told."""
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"


def check_pickles(checkpoint: Path) -> None:
    """Raise ValueError where `.metadata` or `common.pt` of a checkpoint would run code; run none of it.

    Torch reads the first with a plain `pickle.load`. The pickles inside the other files are met as they are loaded.
    """
    path = checkpoint / ".metadata"
    try:
        with path.open("rb") as file:
            _MetadataUnpickler(file).load()
    except _RefusedError as error:
        raise ValueError(_refusal(path, str(error))) from None
    except _MALFORMED as error:
        raise ValueError(f"{path}: not a checkpoint's description ({error}); {_REMEDY}") from None
    path = checkpoint / "common.pt"
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(explain_refusal(path, error)) from None


def explain_refusal(path: Path, error: BaseException) -> str | None:
    """Return a line that says what `torch.load` refused to call for a pickle in `path`, None where it refused none."""
    text = str(error)
    # Inside a distributed checkpoint's own exception, only its text tells.
    if not isinstance(error, pickle.UnpicklingError) and "Weights only load failed" not in text:
        return None
    found = re.search(r"nsupported (?:global: )?GLOBAL (\S+)", text)
    return _refusal(path, found[1] if found else "what is no tensor and no plain value")


def _refusal(path: Path, what: str) -> str:
    return f"{path}: refused, for loading it would call {what}; {_REMEDY}"
