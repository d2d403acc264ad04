"""Tokenizers: Hugging Face `tokenizer.json` and SentencePiece `.model`, given or trained on the corpus.

GPT-2's pair of files, a JSON vocabulary and its merges beside it, is converted to a `tokenizer.json` when read.
"""

import heapq
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece
import tokenizers

from data_scoring.base.engine import num_threads
from data_scoring.base.files import writing
from data_scoring.config import TokenizerConfig
from data_scoring.tokenizer.long_texts import can_cut, cut_text
from data_scoring.tokenizer.long_words import split_long_words
from data_scoring.tokenizer.lost_characters import LostCharacters

_USUAL_ENDS = ("<|endoftext|>", "</s>", "<|im_end|>", "<eos>", "<|end_of_text|>", "[SEP]", "<|eot_id|>")
_TRAINED_END = "<|endoftext|>"
# More than ten times the size of the largest tokenizers; reading weights by mistake would take all memory.
_LARGEST_FILE_BYTES = 512 << 20
# Sixty times the largest vocabularies; tables by id would take all memory.
_LARGEST_ID = 1 << 24
_MOST_CHARACTERS_OF_REASON = 200
# More than documents are batched by: only a very long one is encoded in several steps.
_CHARACTERS_AT_ONCE = 8 << 20


class UnencodableTextError(ValueError):
    """A text, or one of several, that a tokenizer cannot encode for the library's `reason`."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"the tokenizer cannot encode this text ({reason}); set tokenizer.path to one with byte tokens or "
            "an unknown token"
        )


class Tokenizer(Protocol):
    """Text to token ids and back. `end_of_document` is the id that closes a document."""

    vocab_size: int
    end_of_document: int

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, without special tokens; uses all cores.

        Raises UnencodableTextError, for example if a character is not in the vocabulary and there is no unknown token.
        """
        ...

    def find_lost(self, texts: list[str], encoded: list[list[int]]) -> list[str]:
        """Return the characters of each text that its ids do not represent: they are dropped, or unknown tokens."""
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
        self._can_cut = can_cut(self._tokenizer)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text."""
        pieces = [[*cut_text(text)] if self._can_cut else [text] for text in texts]
        ids = self._encode_some([*chain.from_iterable(pieces)])
        with _explained(UnencodableTextError):
            return [[*chain.from_iterable(islice(ids, len(each)))] for each in pieces]

    def _encode_some(self, pieces: list[str]) -> Iterator[list[int]]:
        """Yield the ids of each piece, with the library's encodings, of 100 bytes a token, of some in memory."""
        ends = np.cumsum([len(piece) for piece in pieces])
        start = 0
        while start < len(pieces):
            filled = ends[start] - len(pieces[start]) + _CHARACTERS_AT_ONCE
            stop = max(start + 1, int(np.searchsorted(ends, filled, side="right")))
            for encoding in self._tokenizer.encode_batch_fast(pieces[start:stop], add_special_tokens=False):
                yield encoding.ids
            start = stop

    def find_lost(self, texts: list[str], encoded: list[list[int]]) -> list[str]:
        """Return the lost characters of each text."""
        return self._lost_characters.find(texts, encoded)

    @cached_property
    def _lost_characters(self) -> LostCharacters:
        return LostCharacters(self._tokenizer)

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
        with _explained(UnencodableTextError):
            ids: list[list[int]] = self._processor.encode(texts, num_threads=num_threads() or -1)
        return ids

    def find_lost(self, texts: list[str], encoded: list[list[int]]) -> list[str]:
        """Return the lost characters of each text, normalised as the model does."""
        unknown = self._processor.unk_id()
        return [
            "".join(
                piece
                for piece, token in zip(self._processor.encode(text, out_type=str), ids, strict=True)
                if token == unknown
            ).replace("▁", " ")
            if unknown in ids
            else ""
            for text, ids in zip(texts, encoded, strict=True)
        ]

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids`."""
        return str(self._processor.decode(ids))

    def decode_batch(self, batch: list[list[int]]) -> list[str]:
        """Return the text of each list of ids."""
        return [str(text) for text in self._processor.decode(batch)] if batch else []


@contextmanager
def _explained(make: Callable[[str], ValueError]) -> Iterator[None]:
    """Convert whatever the libraries raise into the error that `make` returns for it, given the reason in one line."""
    try:
        yield
    except BaseException as error:
        # A panic of Rust code is no Exception, and its class cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:_MOST_CHARACTERS_OF_REASON] or type(error).__name__
        raise make(reason) from None


def _load_json(path: Path) -> tokenizers.Tokenizer:
    content = read_tokenizer(path)

    with _explained(
        lambda reason: ValueError(f"{path}: not a tokenizer.json ({reason}); give one of the tokenizers library")
    ):
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
        largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if largest > _LARGEST_ID:
            raise ValueError(f"the id {largest} is larger than any vocabulary")
        return tokenizer


def _load_sentencepiece(path: Path) -> sentencepiece.SentencePieceProcessor:
    _check_size(path)

    with _explained(lambda reason: ValueError(f"{path}: not a SentencePiece model ({reason}); give a .model file")):
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        # In a damaged file, pieces may not be text.
        for token in range(processor.vocab_size()):
            if not isinstance(processor.id_to_piece(token), str):
                raise ValueError(f"piece {token} is not UTF-8")
        return processor


def _check_size(path: Path) -> None:
    size = path.stat().st_size
    if size > _LARGEST_FILE_BYTES:
        raise ValueError(
            f"{path}: {size >> 20} MB is more than a tokenizer has; give a tokenizer.json or a SentencePiece .model"
        )


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
    _check_size(path)
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
    with _explained(
        lambda reason: ValueError(f"{merges}: not the merges of {vocabulary} ({reason}); give a matching pair")
    ):
        model = tokenizers.models.BPE(*tokenizers.models.BPE.read_file(str(vocabulary), str(merges)))
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


def encode_each(tokenizer: Tokenizer, texts: list[str]) -> list[list[int] | UnencodableTextError]:
    """Return the ids of each text, or the error for one that cannot be encoded."""
    try:
        return [*tokenizer.encode_batch(texts)]
    except UnencodableTextError as error:
        if len(texts) == 1:
            return [error]
    half = len(texts) // 2
    return [*encode_each(tokenizer, texts[:half]), *encode_each(tokenizer, texts[half:])]


def install_tokenizer(config: TokenizerConfig, texts: Iterable[str], seed: int, folder: Path) -> Path:
    """Return the path of the tokenizer written to `folder`: a copy of the given one, or one trained on `texts`."""
    if config.path is None:
        return train_tokenizer(config, sample_texts(texts, int(config.train_megabytes * 1e6), seed), folder)
    target = folder / f"tokenizer{Path(config.path).suffix}"
    with writing(target) as temporary:
        temporary.write_bytes(read_tokenizer(Path(config.path)))
    return target


def train_tokenizer(config: TokenizerConfig, sample: Iterator[str], folder: Path) -> Path:
    """Return the path of the tokenizer written to `folder`, trained on all texts of `sample`."""
    target = folder / "tokenizer.json"
    with writing(target) as temporary:
        _train(sample, config.vocab_size).save(str(temporary))
    return target


class TextSample:
    """A random sample of texts, of at most `num_bytes` unless it is a single one: those with the largest keys.

    With keys that are uniform random numbers, the sample is uniform. Texts are kept in memory.
    """

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes, self._total, self._count = num_bytes, 0, 0
        self._heap: list[tuple[float, int, str]] = []

    def add(self, key: float, text: str) -> None:
        """Add a text, unless its key is too small, and drop those that have smaller keys if there is no room."""
        heapq.heappush(self._heap, (key, self._count, text))
        self._count += 1
        self._total += len(text.encode())
        while self._total > self._num_bytes and len(self._heap) > 1:
            self._total -= len(heapq.heappop(self._heap)[2].encode())

    def entries(self) -> Iterator[tuple[float, str]]:
        """Yield the keys and texts of the sample, in the order in which they were added."""
        return ((key, text) for key, _, text in sorted(self._heap, key=lambda entry: entry[1]))


def sample_texts(texts: Iterable[str], num_bytes: int, seed: int) -> Iterator[str]:
    """Return a uniform random sample of `texts` of about `num_bytes`, using no more memory than that."""
    generator, sample = random.Random(seed), TextSample(num_bytes)  # noqa: S311
    for text in texts:
        sample.add(generator.random(), text)
    return (text for _, text in sample.entries())


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
    tokenizer.train_from_iterator(split_long_words(texts, tokenizer.pre_tokenizer), trainer)
    return tokenizer
