"""Tokenizers of every kind, trained on a little English text, for tests that must hold for all of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tests.conftest import make_documents

_DOCUMENTS = make_documents(300)
_SPECIAL = ["<unk>", "</s>"]


def _bpe(pre_tokenizer: Any, normalizer: Any = None, alphabet: bool = True, **model: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer, tokenizer.normalizer = pre_tokenizer, normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=_SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet else [],
    )  # fmt: skip
    tokenizer.train_from_iterator(_DOCUMENTS, trainer)
    return tokenizer


def _byte_level(prefix: bool = False, normalizer: Any = None, **model: Any) -> Tokenizer:
    tokenizer = _bpe(pre_tokenizers.ByteLevel(add_prefix_space=prefix), normalizer, **model)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _with_tokens(*added: AddedToken) -> Tokenizer:
    tokenizer = _byte_level()
    tokenizer.add_tokens([*added])
    return tokenizer


def _split_by_pattern() -> Tokenizer:
    digits = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\s*[\r\n]+|[^\r\n\p{N}]+"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = _bpe(pre_tokenizers.Sequence([digits, byte_level]))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _metaspace(scheme: Any) -> Tokenizer:
    tokenizer = _bpe(pre_tokenizers.Metaspace(prepend_scheme=scheme), alphabet=False, unk_token="<unk>", fuse_unk=True)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return tokenizer


def _llama() -> Tokenizer:
    """Without a pre-tokenizer: merges across words, and a space before each text."""
    content = json.loads(_metaspace("always").to_str())
    content["pre_tokenizer"] = None
    vocab = content["model"]["vocab"]
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    content["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def _unigram(scheme: Any = "always") -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=150,
        special_tokens=_SPECIAL,
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(_DOCUMENTS, trainer)
    return tokenizer


def _word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.normalizer = pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=_SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(_DOCUMENTS, trainer)
    return tokenizer


_ACROSS = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip(), normalizers.Lowercase()])
_JSON: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": _byte_level,
    "byte-level-prefix-space": lambda: _byte_level(prefix=True),
    "byte-level-normalised": lambda: _byte_level(normalizer=_ACROSS),
    "byte-level-words-with-spaces": lambda: _with_tokens(AddedToken("the model", normalized=False)),
    "byte-level-stripping-token": lambda: _with_tokens(AddedToken("loss", lstrip=True, rstrip=True)),
    "byte-level-single-word": lambda: _with_tokens(AddedToken("text", single_word=True)),
    "byte-level-incomplete": lambda: _byte_level(alphabet=False),
    "pattern": _split_by_pattern,
    "metaspace-always": lambda: _metaspace("always"),
    "metaspace-first": lambda: _metaspace("first"),
    "metaspace-never": lambda: _metaspace("never"),
    "dropping": lambda: _bpe(pre_tokenizers.Metaspace(), alphabet=False),
    "dropping-across-words": lambda: _bpe(None, alphabet=False),
    "llama": _llama,
    "unigram": _unigram,
    "unigram-first": lambda: _unigram("first"),
    "word-piece": _word_piece,
}
_SENTENCE_PIECE: dict[str, dict[str, Any]] = {
    "sp-bpe-bytes": {"model_type": "bpe", "byte_fallback": True},
    "sp-bpe": {"model_type": "bpe"},
    "sp-unigram-bytes": {"model_type": "unigram", "byte_fallback": True},
    "sp-unigram": {"model_type": "unigram"},
    "sp-identity": {
        "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "add_dummy_prefix": False,
    },
    "sp-suffix": {"model_type": "bpe", "treat_whitespace_as_suffix": True},
}  # fmt: skip
KINDS = (*_JSON, *_SENTENCE_PIECE)


def make_kind(name: str, folder: Path) -> Path:
    """Return the path of a tokenizer of this kind, written to `folder`."""
    if name in _JSON:
        path = folder / f"{name}.json"
        _JSON[name]().save(str(path))
        return path
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_DOCUMENTS), model_prefix=str(folder / name), vocab_size=350, minloglevel=2,
        hard_vocab_limit=False, **_SENTENCE_PIECE[name],
    )  # fmt: skip
    return folder / f"{name}.model"


def encode_by_library(path: Path, text: str) -> list[int]:
    """Return the ids of a text in one piece, by the library alone."""
    if path.suffix == ".model":
        ids: list[int] = sentencepiece.SentencePieceProcessor(model_file=str(path)).encode(text)
        return ids
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True
    return list(tokenizer.encode(text, add_special_tokens=False).ids)
