"""Reading and writing the safetensors files of a Hugging Face folder, a few tensors at a time."""

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
_FETCH = "it was truncated or changed; download it again"


@dataclass(frozen=True)
class Entry:
    """A tensor's file, shape and dtype."""

    file: Path
    shape: Shape
    dtype: str


class TensorFiles:
    """The tensors of a folder: names, shapes and dtypes are read at once, values one at a time.

    Raises ValueError if there are no safetensors files or they are not intact.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        listed = _list_files(folder)
        for file in dict.fromkeys(listed.values()):
            with _opened(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dictionary)
                    if not name.isprintable():
                        raise ValueError(f"{file}: {name!r} is not a valid tensor name; {_FETCH}")
                    if name in self.entries:
                        raise ValueError(f"{file}: {name} is also in {self.entries[name].file.name}; {_FETCH}")
                    part = tensors.get_slice(name)
                    self.entries[name] = Entry(file, tuple(part.get_shape()), part.get_dtype())
        for name, file in listed.items():
            if name and (name not in self.entries or self.entries[name].file != file):
                raise ValueError(f"{file}: {name} is missing, though {INDEX} lists it; download both again")

    def check(self, shapes: dict[str, Shape], is_ignored: Callable[[str], bool]) -> None:
        """Raise ValueError if the tensors do not have the names and shapes in `shapes` and a supported dtype."""
        for name, shape in shapes.items():
            if name not in self.entries:
                raise ValueError(f"{self.folder}: {name} is missing; config.json requires it; download all files again")
            entry = self.entries[name]
            if entry.shape != shape:
                raise ValueError(
                    f"{entry.file}: {name} is {_by(entry.shape)}, but {_by(shape)} according to config.json; download "
                    "the config.json that belongs to it"
                )
            self._check_type(name)
        for name, entry in self.entries.items():
            if name not in shapes and not is_ignored(name):
                raise ValueError(
                    f"{entry.file}: {name} is not part of the model that config.json describes; such a model cannot "
                    "be imported"
                )

    def _check_type(self, name: str) -> None:
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise ValueError(f"{entry.file}: {name} is of type {entry.dtype}; give one of {', '.join(DTYPES)}")

    def dtype(self, names: Iterable[str]) -> torch.dtype:
        """Return the common dtype of tensors to be joined. Raises ValueError if their dtypes differ."""
        first, *others = names
        for name in others:
            if self.entries[name].dtype != self.entries[first].dtype:
                raise ValueError(
                    f"{self.entries[name].file}: {name} is of type {self.entries[name].dtype} and {first} of "
                    f"{self.entries[first].dtype}; convert both to one type"
                )
        return DTYPES[self.entries[first].dtype]

    def read(self, name: str) -> Tensor:
        """Return a tensor in newly allocated memory.

        Raises ValueError if its dtype is not supported or a value is not finite.
        """
        self._check_type(name)
        file = self.entries[name].file
        with _opened(file) as tensors:
            tensor: Tensor = tensors.get_tensor(name)
        # aminmax gives NaN if there is one, without a temporary as large as the tensor.
        if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise ValueError(f"{file}: {name} has values that are not finite; download it again, or use another model")
        return tensor


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in one of a model's JSON files. Raises ValueError if the file is missing or has no object."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a folder of a Hugging Face model")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); download it again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a JSON object; download it again")
    return values


def write_tensors(
    folder: Path, sizes: Sequence[int], produce: Callable[[int], dict[str, Tensor]], shard_bytes: int
) -> None:
    """Write the tensors of `produce(0)`, `produce(1)`, …, of `sizes` bytes each, to safetensors files in `folder`.

    A file has at most `shard_bytes`, or a single result of `produce`; memory holds one file's tensors. Several files
    get an index.
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
            # safetensors makes files readable by the owner only.
            (folder / file).chmod(0o644)
        except SafetensorError as error:
            raise disk_error(str(error), folder / file) or error from None
        places |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": places})


def _list_files(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor according to the index, or a single file under the name ""."""
    if (folder / SINGLE).is_file():
        return {"": folder / SINGLE}
    if not (folder / INDEX).is_file():
        pickles = [name for name in _PICKLES if (folder / name).is_file()]
        if pickles:
            raise ValueError(
                f"{folder / pickles[0]}: a pickle, which may run code when loaded, so it is refused; if you trust it, "
                "convert it to safetensors with transformers' save_pretrained"
            )
        raise ValueError(f"{folder}: has neither {SINGLE} nor {INDEX}; give a folder of a Hugging Face model")
    places = read_object(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{folder / INDEX}: has no weight_map; download it again")
    for name, file in places.items():
        is_name = isinstance(file, str) and Path(file).name == file and len(file.encode(errors="replace")) < 256
        if not is_name or not (folder / file).is_file():
            shown = name if name.isprintable() else repr(name)
            raise ValueError(
                f"{folder / INDEX}: {shown} is in {file!r:.80}, which is not in the folder; download that too"
            )
    return {name: folder / file for name, file in places.items()}


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        # Read instead of memory-mapped: pages of a mapping stay in memory as long as it does.
        with safe_open(file, framework="pt", backend="pread") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not an intact safetensors file ({' '.join(str(error).split())}); {_FETCH}") from None


def _by(shape: Shape) -> str:
    return " x ".join(map(str, shape)) or "a number"
