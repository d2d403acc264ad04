"""Models of Hugging Face as model folders that Reprise starts from, and Reprise's models as theirs."""

import importlib.metadata
import importlib.resources
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from data_scoring.files import commit, write_json
from data_scoring.hugging_face_tokenizer import export_tokenizer, misreading_families
from data_scoring.tokenizer import Tokenizer, open_tokenizer
from flows.run_folder import read_run
from flows.stored_model import MODEL, ORIGIN, StoredModel, find_model
from trainer.checkpoint_shapes import EMBEDDING
from trainer.config import ModelConfig
from trainer.hugging_face import MODELLING, describe, family_of, read_description
from trainer.hugging_face_files import TensorFiles, read_object

Dtype = Literal["keep", "float32", "bfloat16"]
# Where a model folder keeps what was beside the weights, for the way back.
_ORIGINAL = "original"
_TOKENIZER_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
_BESIDE = ("config.json", "generation_config.json", *_TOKENIZER_FILES)


@dataclass(frozen=True)
class Imported:
    """What was imported: the model, and what there is to say about it, in sentences."""

    model: ModelConfig
    notes: list[str]


def import_model(source: Path, output: Path, end_of_document: str | None = None) -> Imported:
    """Make the model folder `output` of the Hugging Face folder `source`, and return what it holds.

    end_of_document: the token that ends documents; None: the one that `source` calls its end of sequence. Raises
    ValueError, leaving nothing behind, where the model is none that we can have, or what is there is not whole.
    """
    model, notes = read_description(source / "config.json")
    files = TensorFiles(source)
    with _making(output) as folder:
        tokenizer, token = _take_tokenizer(source, folder, model, end_of_document)
        # Here, for it takes a second to import, of which nobody needs who errs.
        from trainer.hugging_face_weights import import_weights

        record = {"step": 0, "vocab_size": tokenizer.vocab_size, "imported_from": str(source.absolute())}
        import_weights(files, model, folder / "checkpoint" / "step-00000000", record)
        fields = model.model_dump(mode="json", exclude_none=True)
        (folder / MODEL).write_text(yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")
        origin = {
            "from": str(source.absolute()),
            "model_type": read_object(source / "config.json")["model_type"],
            "end_of_document": token,
            "notes": notes,
            "reprise": importlib.metadata.version("reprise"),
        }
        write_json(folder / ORIGIN, origin)
        (folder / _ORIGINAL).mkdir()
        for name in _BESIDE:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / _ORIGINAL / name)
    return Imported(model, notes)


@dataclass(frozen=True)
class Exported:
    """What was exported: the family that it is of to transformers, and the checkpoint."""

    family: str
    checkpoint: Path


def export_model(
    place: Path,
    round_number: int | None,
    output: Path,
    dtype: Dtype = "keep",
    shard_bytes: int | None = None,
) -> Exported:
    """Make the folder `output`, which transformers opens, of a round of a run or of a model folder.

    dtype: what weights are stored in. shard_bytes: the most that one file of them has; None: 2 GB. Raises ValueError,
    leaving nothing behind, where there is no such model or it is damaged.
    """
    stored = find_model(place, round_number)
    rows = stored.config.vocab_size or stored.vocab_size
    with _making(output) as folder:
        import torch

        from trainer.hugging_face_weights import SHARD_BYTES, export_weights
        from trainer.weights import Weights

        known = _known(stored)
        end, barred = _give_tokenizer(stored, known.get("max_position_embeddings"), folder)
        known = {"bos_token_id": end, "eos_token_id": end, **known}
        _give_generation(stored, known, folder)
        family = family_of(stored.config, known.get("model_type"), barred)
        weights = Weights(stored.checkpoint)
        wanted = None if dtype == "keep" else getattr(torch, dtype)
        export_weights(weights, stored.config, family, rows, wanted, folder, shard_bytes or SHARD_BYTES)
        stored_as = str(wanted or weights.dtypes[EMBEDDING]).removeprefix("torch.")
        write_json(folder / "config.json", describe(stored.config, family, rows, stored_as, known))
        if family == "reprise":
            code = importlib.resources.files("trainer") / f"{MODELLING}.py"
            (folder / f"{MODELLING}.py").write_bytes(code.read_bytes())
    return Exported(family, stored.checkpoint)


@contextmanager
def _making(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, which in the end appears as `folder` or, after an error, is gone."""
    if folder.exists():
        raise ValueError(f"{folder}: is there already; delete it, or name another folder with --output")
    folder = folder.absolute()
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        commit(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _take_tokenizer(
    source: Path, folder: Path, model: ModelConfig, end_of_document: str | None
) -> tuple[Tokenizer, str | None]:
    """Copy the tokenizer of `source` to `folder`; return it, and the token that ends documents where that is told."""
    paths = [path for path in (source / "tokenizer.json", source / "tokenizer.model") if path.is_file()]
    if not paths:
        raise ValueError(
            f"{source}: has neither tokenizer.json nor tokenizer.model; save one with transformers' save_pretrained"
        )
    token = end_of_document or _end_of_sequence(source)
    tokenizer = open_tokenizer(paths[0], token)
    if tokenizer.vocab_size > (model.vocab_size or 0):
        raise ValueError(
            f"{paths[0]}: has {tokenizer.vocab_size} entries, and model.embed_tokens.weight {model.vocab_size} rows; "
            "it is another model's tokenizer; give this one's"
        )
    shutil.copyfile(paths[0], folder / paths[0].name)
    return tokenizer, token


def _end_of_sequence(source: Path) -> str | None:
    """Return the token that transformers' configuration of the tokenizer calls its end of sequence, where it does."""
    path = source / "tokenizer_config.json"
    token = read_object(path).get("eos_token") if path.is_file() else None
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _known(stored: StoredModel) -> dict[str, Any]:
    """Return what of `config.json` the weights do not say: the original one, or the positions trained for."""
    original = stored.place / _ORIGINAL / "config.json"
    if original.is_file():
        return read_object(original)
    if (stored.place / MODEL).is_file():
        return {}
    return {"max_position_embeddings": read_run(stored.place).corpus().seq_length}


def _give_tokenizer(stored: StoredModel, length: int | None, folder: Path) -> tuple[int, tuple[str, ...]]:
    """Write the tokenizer to `folder`; return the id that ends documents, and families that would misread it."""
    original = stored.place / _ORIGINAL
    end = export_tokenizer(stored.tokenizer, stored.end_of_document, length, folder)
    if stored.tokenizer.suffix != ".json" or not (original / "tokenizer_config.json").is_file():
        return end, misreading_families(stored.tokenizer)
    # As it came, with the tokens that it adds, and for the family that it came with.
    shutil.copyfile(stored.tokenizer, folder / "tokenizer.json")
    for name in _TOKENIZER_FILES:
        if (original / name).is_file():
            shutil.copyfile(original / name, folder / name)
    _drop_code(folder / "tokenizer_config.json")
    return end, ()


def _give_generation(stored: StoredModel, known: dict[str, Any], folder: Path) -> None:
    original = stored.place / _ORIGINAL / "generation_config.json"
    if original.is_file():
        shutil.copyfile(original, folder / original.name)
    else:
        ids = {name: known[name] for name in ("bos_token_id", "eos_token_id") if known[name] is not None}
        write_json(folder / original.name, ids)


def _drop_code(path: Path) -> None:
    """Take out of a tokenizer's configuration what names code that came with it, which is not here."""
    config = read_object(path)
    if config.pop("auto_map", None) is not None:
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
