"""The tokenizer of a Hugging Face folder: taken with a model that comes, and given with one that goes."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_scoring.base.files import write_json
from data_scoring.config import padded_vocab_size
from data_scoring.tokenizer.auto_tokenizer_files import export_tokenizer, misreading_families
from data_scoring.tokenizer.tokenizer import Tokenizer, name_token, open_tokenizer, read_tokenizer
from flows.run.stored_model import ORIGIN, StoredModel
from trainer.hugging_face_files import read_object

# Where a model folder keeps what was beside the weights, for the way back.
ORIGINAL = "original"
_CONFIG, _ADDED = "tokenizer_config.json", "added_tokens.json"
TOKENIZER_FILES = (_CONFIG, "special_tokens_map.json", _ADDED, "chat_template.jinja", "chat_template.json")


@dataclass(frozen=True)
class Taken:
    """A tokenizer that was taken: its entries, the token that ends documents where that is told, and notes."""

    vocab_size: int
    end_of_document: str | None
    notes: list[str]


def take_tokenizer(source: Path, folder: Path, rows: int, asked: str | None) -> Taken:
    """Copy the tokenizer of `source`, of a model whose embedding has `rows`, to `folder`.

    asked: the token that ends documents; None: the one that `source` calls its end of sequence. Raises ValueError where
    it is no tokenizer, or not this model's.
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
        # Here, no configuration has it.
        raise ValueError(str(error).replace("tokenizer.end_of_document", "--end-of-document")) from None
    if path.suffix == ".model":
        _check_added(source, path, tokenizer.vocab_size)
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"{path}: has {tokenizer.vocab_size} entries, and model.embed_tokens.weight {rows} rows; "
            "it is another model's tokenizer; give this one's"
        )
    if ends and asked is None:
        _check_end(source, path, tokenizer, ends)
    (folder / path.name).write_bytes(read_tokenizer(path))
    notes = []
    if ends and tokenizer.end_of_document not in ends:
        notes.append(f"{asked!r} is to end documents, which is not what config.json's eos_token_id {ends} says")
    if padded_vocab_size(tokenizer.vocab_size) < 0.9 * rows:
        notes.append(
            f"{path.name} has {tokenizer.vocab_size} entries, and the embedding {rows} rows: make sure that it is this "
            "model's"
        )
    if config.get("auto_map") is not None:
        notes.append(f"code that {_CONFIG} names is left out: the tokenizer is what {path.name} says")
    return Taken(tokenizer.vocab_size, token, notes)


def give_tokenizer(stored: StoredModel, rows: int, length: int | None, folder: Path) -> tuple[int, tuple[str, ...]]:
    """Write the tokenizer to `folder`; return the id that ends documents, and families that would misread it.

    rows: of the embedding. length: the longest sequence, in tokens, that the model was trained for. An imported model's
    goes as it came where that is possible, and to the family that it came with in any case.
    """
    path, original = stored.tokenizer, stored.place / ORIGINAL
    tokenizer = open_tokenizer(path, stored.end_of_document)
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"{path}: has {tokenizer.vocab_size} entries, and the model's embedding {rows} rows; put back the "
            "tokenizer that it was trained with"
        )
    barred = () if (stored.place / ORIGIN).is_file() else misreading_families(path)
    config = _read_if_there(original / _CONFIG)
    has_code = config.pop("auto_map", None) is not None
    if not config or (has_code and path.suffix == ".model"):
        return export_tokenizer(path, stored.end_of_document, length, folder), barred
    for file in (path, *(original / name for name in TOKENIZER_FILES)):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    if has_code:
        # The code is not here; what it made of the file, the library's own class makes.
        write_json(folder / _CONFIG, {**config, "tokenizer_class": "PreTrainedTokenizerFast"})
    return tokenizer.end_of_document, barred


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _read_ends(source: Path, rows: int) -> list[int]:
    """Return the ids that config.json says end a sequence."""
    ends = read_object(source / "config.json").get("eos_token_id")
    return [end for end in (ends if isinstance(ends, list) else [ends]) if type(end) is int and 0 <= end < rows]


def _content(token: Any) -> str | None:
    """Return a token as transformers writes it: itself, or an object that has it."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _check_added(source: Path, path: Path, vocab_size: int) -> None:
    """Raise ValueError where tokens are added to a SentencePiece model, which `path` alone does not hold."""
    added = {content: number for content, number in _read_if_there(source / _ADDED).items() if isinstance(number, int)}
    decoder = _read_if_there(source / _CONFIG).get("added_tokens_decoder")
    for number, token in (decoder if isinstance(decoder, dict) else {}).items():
        if number.isdecimal():
            added[str(_content(token))] = int(number)
    beyond = [content for content, number in added.items() if number >= vocab_size]
    if beyond:
        raise ValueError(
            f"{path}: tokens are added to its {vocab_size} entries, such as {beyond[0]!r}, which it does not hold; "
            "open it with transformers and save it as tokenizer.json (save_pretrained)"
        )


def _check_end(source: Path, path: Path, tokenizer: Tokenizer, ends: list[int]) -> None:
    """Raise ValueError where the tokenizer's end of sequence is none of the ids `ends`: it is another model's."""
    end = tokenizer.end_of_document
    if end not in ends:
        raise ValueError(
            f"{source / 'config.json'}: eos_token_id is {', '.join(map(str, ends))}, and {name_token(path, end)!r}, "
            f"which ends a sequence for {path.name}, is {end}; give this model's tokenizer, or name the token that "
            "ends documents with --end-of-document"
        )
