"""Import and export of the tokenizer in a Hugging Face folder."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_scoring.base.files import write_json
from data_scoring.config import padded_vocab_size
from data_scoring.tokenizer.auto_tokenizer_files import MODEL, export_tokenizer, misreading_families
from data_scoring.tokenizer.tokenizer import Tokenizer, name_token, open_tokenizer, read_tokenizer
from flows.run.stored_model import ORIGIN, StoredModel
from trainer.hugging_face_files import read_object

# Folder in a model folder with the original files beside the weights, for export.
ORIGINAL = "original"
_CONFIG, _ADDED = "tokenizer_config.json", "added_tokens.json"
# The SentencePiece model is beside the tokenizer.json that transformers made of it: llama.cpp reads only the model.
TOKENIZER_FILES = (MODEL, _CONFIG, "special_tokens_map.json", _ADDED, "chat_template.jinja", "chat_template.json")


@dataclass(frozen=True)
class Taken:
    """An imported tokenizer: its number of entries, its end-of-document token if known, and notes for the user."""

    vocab_size: int
    end_of_document: str | None
    notes: list[str]


def take_tokenizer(source: Path, folder: Path, rows: int, asked: str | None) -> Taken:
    """Copy the tokenizer of `source` to `folder`, and return a summary; `rows` is the size of the model's embedding.

    asked: the token that ends documents; None: the end-of-sequence token of `source`. Raises ValueError if there is no
    valid tokenizer, or it does not belong to this model.
    """
    paths = [path for path in (source / "tokenizer.json", source / "tokenizer.model") if path.is_file()]
    if not paths:
        raise ValueError(
            f"{source}: has neither tokenizer.json nor tokenizer.model; save one with transformers' save_pretrained"
        )
    path, config = paths[0], _read_if_there(source / _CONFIG)
    ends = _read_ends(source, rows)
    try:
        token = asked or _content(config.get("eos_token")) or (name_token(path, ends[0]) if ends else None)
        tokenizer = open_tokenizer(path, token)
    except ValueError as error:
        # Import has no configuration; the command line sets the token.
        raise ValueError(str(error).replace("tokenizer.end_of_document", "--end-of-document")) from None
    if path.suffix == ".model":
        _check_added(source, path, tokenizer.vocab_size)
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"{path}: has {tokenizer.vocab_size} entries, but model.embed_tokens.weight has {rows} rows; "
            "it belongs to another model; give this model's tokenizer"
        )
    if ends and asked is None:
        _check_end(source, path, tokenizer, ends)
    (folder / path.name).write_bytes(read_tokenizer(path))
    notes = []
    if ends and tokenizer.end_of_document not in ends:
        notes.append(f"{asked!r} ends documents, but is not among config.json's eos_token_id {ends}")
    if padded_vocab_size(tokenizer.vocab_size) < 0.9 * rows:
        notes.append(
            f"{path.name} has {tokenizer.vocab_size} entries, but the embedding has {rows} rows: make sure that it "
            "belongs to this model"
        )
    if config.get("auto_map") is not None:
        notes.append(f"the code that {_CONFIG} names is not used: the tokenizer is read from {path.name} alone")
    return Taken(tokenizer.vocab_size, token, notes)


def give_tokenizer(stored: StoredModel, rows: int, length: int | None, folder: Path) -> tuple[int, tuple[str, ...]]:
    """Write the tokenizer to `folder`; return the end-of-document id and the families that would misread it.

    rows: those of the embedding. length: the longest sequence, in tokens, that the model was trained for. An imported
    model's tokenizer files are copied unchanged if possible, and no family is excluded for them.
    """
    path, original = stored.tokenizer, stored.place / ORIGINAL
    tokenizer = open_tokenizer(path, stored.end_of_document)
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"{path}: has {tokenizer.vocab_size} entries, but the model's embedding has {rows} rows; restore the "
            "tokenizer that it was trained with"
        )
    barred = () if (stored.place / ORIGIN).is_file() else misreading_families(path)
    config = _read_if_there(original / _CONFIG)
    has_code = config.pop("auto_map", None) is not None
    if not config or (has_code and path.suffix == ".model"):
        if (original / MODEL).is_file():
            shutil.copyfile(original / MODEL, folder / MODEL)
        return export_tokenizer(path, stored.end_of_document, length, folder), barred
    for file in (path, *(original / name for name in TOKENIZER_FILES)):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    if has_code:
        # The code is not exported; the library's own class reads the file in the same way.
        write_json(folder / _CONFIG, {**config, "tokenizer_class": "PreTrainedTokenizerFast"})
    return tokenizer.end_of_document, barred


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _read_ends(source: Path, rows: int) -> list[int]:
    """Return the end-of-sequence ids in config.json."""
    ends = read_object(source / "config.json").get("eos_token_id")
    return [end for end in (ends if isinstance(ends, list) else [ends]) if type(end) is int and 0 <= end < rows]


def _content(token: Any) -> str | None:
    """Return the text of a token as transformers writes it: a string, or an object with a `content` field."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _check_added(source: Path, path: Path, vocab_size: int) -> None:
    """Raise ValueError if other files add tokens to the SentencePiece model in `path`."""
    added = {content: number for content, number in _read_if_there(source / _ADDED).items() if isinstance(number, int)}
    decoder = _read_if_there(source / _CONFIG).get("added_tokens_decoder")
    for number, token in (decoder if isinstance(decoder, dict) else {}).items():
        if number.isdecimal():
            added[str(_content(token))] = int(number)
    beyond = [content for content, number in added.items() if number >= vocab_size]
    if beyond:
        raise ValueError(
            f"{path}: lacks tokens that other files add to its {vocab_size} entries, such as {beyond[0]!r}; open it "
            "with transformers and save it as tokenizer.json (save_pretrained)"
        )


def _check_end(source: Path, path: Path, tokenizer: Tokenizer, ends: list[int]) -> None:
    """Raise ValueError if the tokenizer's end-of-sequence id is not among `ends`: it belongs to another model."""
    end = tokenizer.end_of_document
    if end not in ends:
        raise ValueError(
            f"{source / 'config.json'}: eos_token_id is {', '.join(map(str, ends))}, but the end-of-sequence token of "
            f"{path.name}, {name_token(path, end)!r}, is {end}; give this model's tokenizer, or name the token that "
            "ends documents with --end-of-document"
        )
