"""Import of Hugging Face models as model folders that Reprise starts from, and export of Reprise's models."""

import importlib.resources
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from data_scoring.base.files import making, write_json, write_record
from flows.models.hugging_face_tokenizers import ORIGINAL, TOKENIZER_FILES, give_tokenizer, take_tokenizer
from flows.run.folder import read_run
from flows.run.stored_model import MODEL, ORIGIN, StoredModel, find_model
from flows.run.versions import reprise_version
from trainer.checkpoint_folder import read_checkpoint_record
from trainer.config import ModelConfig
from trainer.hugging_face_config import MODELLING, describe, family_of, read_description
from trainer.hugging_face_files import TensorFiles, read_object

if TYPE_CHECKING:
    from trainer.weights import Weights

Dtype = Literal["keep", "float32", "bfloat16"]
_BESIDE = ("config.json", "generation_config.json", *TOKENIZER_FILES)


@dataclass(frozen=True)
class Imported:
    """The imported model, and notes for the user in sentences."""

    model: ModelConfig
    notes: list[str]


def import_model(source: Path, output: Path, end_of_document: str | None = None) -> Imported:
    """Convert the Hugging Face folder `source` to the model folder `output`, and return what was imported.

    end_of_document: the token that ends documents; None: the end-of-sequence token of `source`. Raises ValueError,
    leaving nothing behind, if the model is not supported or its files are incomplete.
    """
    model, notes = read_description(source / "config.json")
    files = TensorFiles(source)
    with new_folder(output) as folder:
        tokenizer = take_tokenizer(source, folder, model.vocab_size or 0, end_of_document)
        notes += tokenizer.notes
        # Imported here because it takes a second, which errors above should not have to wait for.
        from trainer.hugging_face_weights import import_weights

        record = {"step": 0, "vocab_size": tokenizer.vocab_size, "imported_from": str(source.absolute())}
        import_weights(files, model, folder / "checkpoint" / "step-00000000", record)
        fields = model.model_dump(mode="json", exclude_none=True)
        (folder / MODEL).write_text(yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")
        origin = {
            "from": str(source.absolute()),
            "model_type": read_object(source / "config.json")["model_type"],
            "end_of_document": tokenizer.end_of_document,
            "notes": notes,
            "reprise": reprise_version(),
        }
        write_record(folder / ORIGIN, origin)
        (folder / ORIGINAL).mkdir()
        for name in _BESIDE:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / ORIGINAL / name)
    return Imported(model, notes)


@dataclass(frozen=True)
class Exported:
    """The exported model: its family in transformers, its checkpoint, its folder, and notes for the user."""

    family: str
    checkpoint: Path
    folder: Path
    notes: list[str]


def export_model(
    place: Path,
    round_number: int | None,
    output: Path | None,
    dtype: Dtype = "keep",
    shard_bytes: int | None = None,
) -> Exported:
    """Export a round of a run, or a model folder, to the folder `output`, which transformers opens.

    output: None: export/ in `place`, for a run with one folder per round. dtype: the type in which weights are stored.
    shard_bytes: the most bytes of one weight file; None: 500 MB. Raises ValueError, leaving nothing behind, if there is
    no such model or it is damaged.
    """
    stored = find_model(place, round_number)
    rows = stored.config.vocab_size or stored.vocab_size
    output = output or _export_folder(stored)
    with new_folder(output) as folder:
        import torch

        from trainer.hugging_face_weights import SHARD_BYTES, export_weights
        from trainer.weights import Weights

        known = known_fields(stored)
        end, barred = give_tokenizer(stored, rows, known.get("max_position_embeddings"), folder)
        known = {"bos_token_id": end, "eos_token_id": end, **known}
        _give_generation(stored, known, folder)
        family = family_of(stored.config, known.get("model_type"), barred)
        weights = Weights(stored.checkpoint)
        wanted = None if dtype == "keep" else getattr(torch, dtype)
        export_weights(weights, stored.config, family, rows, wanted, folder, shard_bytes or SHARD_BYTES)
        stored_as = _dtype(weights, known) if dtype == "keep" else dtype
        write_json(folder / "config.json", describe(stored.config, family, rows, stored_as, known))
        if family == "reprise":
            code = importlib.resources.files("trainer") / f"{MODELLING}.py"
            (folder / f"{MODELLING}.py").write_bytes(code.read_bytes())
    return Exported(family, stored.checkpoint, output, unfinished(stored))


def _export_folder(stored: StoredModel) -> Path:
    folder = stored.place / "export"
    return folder if stored.round_number is None else folder / f"round-{stored.round_number}"


def unfinished(stored: StoredModel) -> list[str]:
    """Return a note for the user if the model's round has not ended."""
    record = read_checkpoint_record(stored.checkpoint, "step")
    step, last = record["step"], record.get("num_steps")
    return [] if last in (None, step) else [f"this is step {step:,} of {last:,}: its round has not ended"]


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, which is renamed to `folder` or, after an error, deleted.

    Raises ValueError if there is such a folder.
    """
    if folder.exists():
        raise ValueError(f"{folder}: already exists; delete it, or name another folder with --output")
    with making(folder.absolute()) as temporary:
        yield temporary


def known_fields(stored: StoredModel) -> dict[str, Any]:
    """Return the fields of `config.json` that weights do not determine: the original's, or the trained positions."""
    original = stored.place / ORIGINAL / "config.json"
    if original.is_file():
        return read_object(original)
    if (stored.place / MODEL).is_file():
        return {}
    return {"max_position_embeddings": read_run(stored.place).corpus().seq_length}


def _dtype(weights: "Weights", known: dict[str, Any]) -> str:
    """Return the dtype of unconverted weights: the one in the original config, or one that can represent them all."""
    told = known.get("dtype") or known.get("torch_dtype")
    if isinstance(told, str):
        return told
    import torch

    return str(reduce(torch.promote_types, weights.dtypes.values())).removeprefix("torch.")


def _give_generation(stored: StoredModel, known: dict[str, Any], folder: Path) -> None:
    original = stored.place / ORIGINAL / "generation_config.json"
    if original.is_file():
        shutil.copyfile(original, folder / original.name)
    else:
        ids = {name: known[name] for name in ("bos_token_id", "eos_token_id") if known[name] is not None}
        write_json(folder / original.name, ids)
