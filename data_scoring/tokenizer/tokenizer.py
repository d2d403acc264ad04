"""Tokenizers: Hugging Face `tokenizer.json` and SentencePiece `.model`, given or trained on the corpus.

GPT-2's pair of files, a JSON vocabulary and its merges beside it, is converted to a `tokenizer.json` when read.
"""

import heapq
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers

from data_scoring.base.files import writing
from data_scoring.config import TokenizerConfig

_USUAL_ENDS = ("<|endoftext|>", "</s>", "<|im_end|>", "<eos>", "<|end_of_text|>", "[SEP]", "<|eot_id|>")
_TRAINED_END = "<|endoftext|>"


class Tokenizer(Protocol):
    """Text to token ids and back. `end_of_document` is the id that closes a document."""

    vocab_size: int
    end_of_document: int

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, without special tokens; uses all cores."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids`, special tokens included."""
        ...

    def decode_batch(self, batch: list[list[int]]) -> list[str]:
        """Return the text of each list of ids; uses all cores where the library does."""
        ...


class HuggingFaceTokenizer:
    """A `tokenizer.json` of the `tokenizers` library."""

    def __init__(self, path: Path, end_of_document: str | None) -> None:
        # Set before the library first uses threads: otherwise datasets' worker processes reduce it to one core.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        self._tokenizer = _load_json(path)
        # Special tokens that appear in the corpus are encoded as text.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.end_of_document = _find_end(path, self._tokenizer.token_to_id, end_of_document)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids`."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def decode_batch(self, batch: list[list[int]]) -> list[str]:
        """Return the text of each list of ids."""
        return list(self._tokenizer.decode_batch(batch, skip_special_tokens=False))


class SentencePieceTokenizer:
    """A SentencePiece `.model`."""

    def __init__(self, path: Path, end_of_document: str | None) -> None:
        self._processor = _load_sentencepiece(path)
        self.vocab_size = self._processor.vocab_size()
        if end_of_document is None and self._processor.eos_id() >= 0:
            self.end_of_document = self._processor.eos_id()
        else:
            self.end_of_document = _find_end(path, self._piece_to_id, end_of_document)

    def _piece_to_id(self, piece: str) -> int | None:
        token = self._processor.piece_to_id(piece)
        return token if self._processor.id_to_piece(token) == piece else None

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text."""
        ids: list[list[int]] = self._processor.encode(texts, num_threads=-1)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids`."""
        return str(self._processor.decode(ids))

    def decode_batch(self, batch: list[list[int]]) -> list[str]:
        """Return the text of each list of ids."""
        return [str(text) for text in self._processor.decode(batch)] if batch else []


def _load_json(path: Path) -> tokenizers.Tokenizer:
    content = read_tokenizer(path)
    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # noqa: BLE001 (what the library raises)
        raise ValueError(f"{path}: not a tokenizer.json ({error}); give one of the tokenizers library") from None


def _load_sentencepiece(path: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path}: not a SentencePiece model ({error}); give a .model file") from None


def name_token(path: Path, token: int) -> str | None:
    """Return the string of the token with id `token` in the tokenizer in `path`, or None if there is none."""
    if path.suffix == ".json":
        return _load_json(path).id_to_token(token)
    processor = _load_sentencepiece(path)
    return str(processor.id_to_piece(token)) if token < processor.vocab_size() else None


def read_tokenizer(path: Path) -> bytes:
    """Return the content of a tokenizer file; for the vocabulary of GPT-2's pair, the resulting `tokenizer.json`.

    Raises ValueError if `path` is a vocabulary without its merges beside it.
    """
    content = path.read_bytes()
    if path.suffix != ".json":
        return content
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return content  # The library reports the error.
    if not isinstance(values, dict) or not values or not all(isinstance(value, int) for value in values.values()):
        return content
    prefix = path.stem.removesuffix("encoder").removesuffix("vocab")
    merges = [file for pattern in ("*.bpe", "*merges.txt") for file in path.parent.glob(f"{prefix}{pattern}")]
    if len(merges) != 1:
        raise ValueError(
            f"{path}: a vocabulary without merges: {len(merges)} files such as {prefix}vocab.bpe or "
            f"{prefix}merges.txt are beside it; put exactly one there"
        )
    return _join_pair(path, merges[0]).to_str(pretty=True).encode()


def _join_pair(vocabulary: Path, merges: Path) -> tokenizers.Tokenizer:
    try:
        model = tokenizers.models.BPE(*tokenizers.models.BPE.read_file(str(vocabulary), str(merges)))
    except Exception as error:  # noqa: BLE001 (what the library raises)
        raise ValueError(f"{merges}: not the merges of {vocabulary} ({error}); give a matching pair") from None
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    if tokenizer.token_to_id(_TRAINED_END) is not None:
        tokenizer.add_special_tokens([_TRAINED_END])
    return tokenizer


def _find_end(path: Path, token_to_id: object, wanted: str | None) -> int:
    assert callable(token_to_id)
    for token in (wanted,) if wanted is not None else _USUAL_ENDS:
        index = token_to_id(token)
        if index is not None:
            return int(index)
    if wanted is not None:
        raise ValueError(f"tokenizer.end_of_document: {wanted!r} is not a token of {path}; name one that is")
    raise ValueError(
        f"{path}: has none of the tokens {', '.join(_USUAL_ENDS)}; name its end token in tokenizer.end_of_document"
    )


def open_tokenizer(path: Path, end_of_document: str | None) -> Tokenizer:
    """Return the tokenizer in `path`; its suffix, `.json` or `.model`, determines the kind.

    Raises ValueError if the file is missing, unreadable or has no such end-of-document token.
    """
    if not path.is_file():
        raise ValueError(f"tokenizer.path: {path}: no such file; give a tokenizer.json or a SentencePiece .model")
    kinds: dict[str, Callable[[Path, str | None], Tokenizer]] = {
        ".json": HuggingFaceTokenizer,
        ".model": SentencePieceTokenizer,
    }
    if path.suffix not in kinds:
        raise ValueError(f"tokenizer.path: {path}: ends in neither .json nor .model; give such a file")
    return kinds[path.suffix](path, end_of_document)


def install_tokenizer(config: TokenizerConfig, texts: Iterable[str], seed: int, folder: Path) -> Path:
    """Return the path of the tokenizer written to `folder`: a copy of the given one, or one trained on `texts`."""
    if config.path is not None:
        target = folder / f"tokenizer{Path(config.path).suffix}"
        with writing(target) as temporary:
            temporary.write_bytes(read_tokenizer(Path(config.path)))
        return target
    target = folder / "tokenizer.json"
    sample = sample_texts(texts, int(config.train_megabytes * 1e6), seed)
    with writing(target) as temporary:
        _train(sample, config.vocab_size).save(str(temporary))
    return target


def sample_texts(texts: Iterable[str], num_bytes: int, seed: int) -> Iterator[str]:
    """Return a uniform random sample of `texts` of about `num_bytes`, using no more memory than that."""
    generator = random.Random(seed)  # noqa: S311
    heap: list[tuple[float, int, str]] = []
    total = 0
    for number, text in enumerate(texts):
        heapq.heappush(heap, (generator.random(), number, text))
        total += len(text.encode())
        while total > num_bytes and len(heap) > 1:
            total -= len(heapq.heappop(heap)[2].encode())
    return (text for _, _, text in sorted(heap, key=lambda entry: entry[1]))


def _train(texts: Iterator[str], vocab_size: int) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_TRAINED_END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
