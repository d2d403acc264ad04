"""The tensors of a Hugging Face folder in its safetensors files, one or several: read and written a few at a time."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_scoring.base.files import disk_error, write_json
from trainer.checkpoint_shapes import Shape

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_FETCH = "it was cut short or changed; fetch it again"


@dataclass(frozen=True)
class Entry:
    """Where a tensor is, and what its file says about it."""

    file: Path
    shape: Shape
    dtype: str


class TensorFiles:
    """The tensors of a folder: names, shapes and dtypes at once, values one at a time.

    Raises ValueError where there are no safetensors, or what is there is not whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        listed = _list_files(folder)
        for file in dict.fromkeys(listed.values()):
            with _opened(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (it is no dictionary)
                    if not name.isprintable():
                        raise ValueError(f"{file}: {name!r} is no name of a tensor; {_FETCH}")
                    if name in self.entries:
                        raise ValueError(f"{file}: {name} is in {self.entries[name].file.name} too; {_FETCH}")
                    part = tensors.get_slice(name)
                    self.entries[name] = Entry(file, tuple(part.get_shape()), part.get_dtype())
        for name, file in listed.items():
            if name and (name not in self.entries or self.entries[name].file != file):
                raise ValueError(f"{file}: {name} is missing, which {INDEX} says is in it; fetch both again")

    def check(self, shapes: dict[str, Shape], is_ignored: Callable[[str], bool]) -> None:
        """Raise ValueError where the tensors are not those of `shapes`, of a floating type that we know."""
        for name, shape in shapes.items():
            if name not in self.entries:
                raise ValueError(f"{self.folder}: {name} is missing, which config.json asks for; fetch all files again")
            entry = self.entries[name]
            if entry.shape != shape:
                raise ValueError(
                    f"{entry.file}: {name} is {_by(entry.shape)}, and config.json makes it {_by(shape)}; fetch the "
                    "config.json that belongs to it"
                )
            self._check_type(name)
        for name, entry in self.entries.items():
            if name not in shapes and not is_ignored(name):
                raise ValueError(
                    f"{entry.file}: {name} is no part of the model that config.json describes; such a model cannot be "
                    "imported"
                )

    def _check_type(self, name: str) -> None:
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise ValueError(f"{entry.file}: {name} is of type {entry.dtype}; give one of {', '.join(DTYPES)}")

    def dtype(self, names: Iterable[str]) -> torch.dtype:
        """Return the type of tensors that go into one. Raises ValueError where they have several."""
        first, *others = names
        for name in others:
            if self.entries[name].dtype != self.entries[first].dtype:
                raise ValueError(
                    f"{self.entries[name].file}: {name} is of type {self.entries[name].dtype} and {first} of "
                    f"{self.entries[first].dtype}; bring both to one"
                )
        return DTYPES[self.entries[first].dtype]

    def read(self, name: str) -> Tensor:
        """Return a tensor, in memory of its own. Raises ValueError where it has a type that we do not know.

        So it does where a value in it is not finite.
        """
        self._check_type(name)
        file = self.entries[name].file
        with _opened(file) as tensors:
            tensor: Tensor = tensors.get_tensor(name)
        # The extremes of what holds a NaN are NaN; nothing as large as the tensor is made.
        if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise ValueError(f"{file}: {name} has values that are not finite; fetch it again, or give another model")
        return tensor


def read_object(path: Path) -> dict[str, Any]:
    """Return what is in one of a model's JSON files. Raises ValueError where there is no such file or no object."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a folder of a Hugging Face model")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); fetch it again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds no JSON object; fetch it again")
    return values


def write_tensors(
    folder: Path, sizes: Sequence[int], produce: Callable[[int], dict[str, Tensor]], shard_bytes: int
) -> None:
    """Write the tensors of `produce(0)`, `produce(1)`, …, of `sizes` bytes each, into safetensors files in `folder`.

    A file has `shard_bytes` at most, or one of these; memory holds what goes into one. Several get an index.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    shards: list[list[int]] = [[]]
    for number, size in enumerate(sizes):
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(number)
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: tensor for part in shard for name, tensor in produce(part).items()}
        try:
            save_file(tensors, folder / file, metadata={"format": "pt"})
            # safetensors lets nobody else read it.
            (folder / file).chmod(0o644)
        except SafetensorError as error:
            raise disk_error(str(error), folder / file) or error from None
        places |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": places})


def _list_files(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor by the index, or, under no name, the only file."""
    if (folder / SINGLE).is_file():
        return {"": folder / SINGLE}
    if not (folder / INDEX).is_file():
        pickles = [name for name in _PICKLES if (folder / name).is_file()]
        if pickles:
            raise ValueError(
                f"{folder / pickles[0]}: a pickle, which may run code when it is loaded, so it is not; convert it "
                "where you trust it, with transformers' save_pretrained, which writes safetensors"
            )
        raise ValueError(f"{folder}: has neither {SINGLE} nor {INDEX}; give a folder of a Hugging Face model")
    places = read_object(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{folder / INDEX}: has no weight_map; fetch it again")
    for name, file in places.items():
        is_name = isinstance(file, str) and Path(file).name == file and len(file.encode(errors="replace")) < 256
        if not is_name or not (folder / file).is_file():
            shown = name if name.isprintable() else repr(name)
            raise ValueError(
                f"{folder / INDEX}: {shown} is in {file!r:.80}, which is no file beside it; fetch that too"
            )
    return {name: folder / file for name, file in places.items()}


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        # Read, not mapped: what has been read would stay in memory as long as the mapping does.
        with safe_open(file, framework="pt", backend="pread") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: no whole safetensors file ({' '.join(str(error).split())}); {_FETCH}") from None


def _by(shape: Shape) -> str:
    return " x ".join(map(str, shape)) or "a number"
