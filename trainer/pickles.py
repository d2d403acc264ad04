"""Safe loading of pickles in checkpoints: only tensors and plain values are allowed."""

import os
import pickle
import re
from enum import Enum
from pathlib import Path
from typing import Any

import torch

_REMEDY = "it was not written by Reprise; delete the checkpoint, or restore it from a trusted copy"

# Classes in torch's metadata of a distributed checkpoint; calling them has no side effects.
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
# By which Python 3.11.0 to 3.11.3 pickle members of enumerations, for which alone it is allowed.
_GETATTR = ("builtins", "getattr")
_MALFORMED = (pickle.UnpicklingError, EOFError, AttributeError, ImportError, LookupError, TypeError, ValueError)


class _RefusedError(Exception):
    """A pickle refers to a global that is not allowed."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == _GETATTR:
            return _enum_member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _ALLOWED:
            raise _RefusedError(f"{module}.{name}")
        return super().find_class(module, name)


def _enum_member(kind: Any, name: Any) -> Enum:
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise _RefusedError(".".join(_GETATTR))
    return kind[name]


def allow_plain_pickles_only() -> None:
    """Make every `torch.load` in this process use `weights_only`, whatever its arguments."""
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"


def check_pickles(checkpoint: Path) -> None:
    """Raise ValueError if `.metadata` or `common.pt` of a checkpoint would run code, without running it.

    Torch reads the first with a plain `pickle.load`. Pickles in the other files are checked when they are loaded.
    """
    path = checkpoint / ".metadata"
    try:
        with path.open("rb") as file:
            _MetadataUnpickler(file).load()
    except _RefusedError as error:
        raise ValueError(_refusal(path, str(error))) from None
    except _MALFORMED as error:
        raise ValueError(f"{path}: not the metadata of a checkpoint ({error}); {_REMEDY}") from None
    path = checkpoint / "common.pt"
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(explain_refusal(path, error)) from None


def explain_refusal(path: Path, error: BaseException) -> str | None:
    """Return a message naming what `torch.load` refused to call for a pickle in `path`; None for other errors."""
    text = str(error)
    # Distributed checkpointing wraps the exception, which then shows only in the text.
    if not isinstance(error, pickle.UnpicklingError) and "Weights only load failed" not in text:
        return None
    found = re.search(r"nsupported (?:global: )?GLOBAL (\S+)", text)
    return _refusal(path, found[1] if found else "something other than tensors and plain values")


def _refusal(path: Path, what: str) -> str:
    return f"{path}: refused, because loading it would call {what}; {_REMEDY}"
