"""Exported tokenizers give the same ids in transformers as here, for every text."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model

from data_scoring.base.files import write_json
from data_scoring.config import TokenizerConfig
from data_scoring.tokenizer.auto_tokenizer_files import convert, converts_exactly, export_tokenizer, misreading_families
from data_scoring.tokenizer.token_coverage import choose_tokens
from data_scoring.tokenizer.tokenizer import install_tokenizer, open_tokenizer
from data_scoring.tokenizer.vocabulary import open_vocabulary
from tests.conftest import make_documents

SHARED = Path("../shared")
TEXTS = [
    "naïve café, 中文和 English 12345, I'LL we've",
    "def f(x):\n\treturn x  # 😀\n\n        pass\r\n",
    "  spaces  ",
    "\n\n \n x",
    "▁lower ﬁ ½ Ⅷ 　全角 é",
    "👩‍👩‍👧‍👦 한국어 العربية",
    "where <s> the </s> and <unk> <|endoftext|> are text",
    "",
    *(" " * count + "x" for count in range(1, 70)),
    *make_documents(60, 3),
]


def train(model_type: str, path: Path, **options: Any) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*make_documents(400), *TEXTS[:2]]), model_prefix=str(path.with_suffix("")),
        vocab_size=420, model_type=model_type, minloglevel=2, hard_vocab_limit=False, **options,
    )  # fmt: skip


def like_llama(path: Path) -> None:
    """A BPE with Llama's pieces of spaces alone, all of one score."""
    options = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    train("bpe", path, **options)
    proto = sentencepiece_model.ModelProto.FromString(path.read_bytes())
    have = {entry.piece for entry in proto.pieces}
    for entry in [entry for entry in proto.pieces if set(entry.piece) == {"▁"} and len(entry.piece) > 1]:
        proto.pieces.remove(entry)
    proto.pieces.extend(proto.SentencePiece(piece="▁" * length, score=-1e9, type=1) for length in range(2, 17))
    assert "▁the" in have
    path.write_bytes(proto.SerializeToString())


def compacted(path: Path) -> None:
    like_llama(path)
    vocabulary = open_vocabulary(path)
    counts = np.ones(len(vocabulary.pieces), np.int64)
    vocabulary.save(choose_tokens(vocabulary, counts, len(vocabulary.pieces) - 40).kept, path)


KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "own.json": (
        lambda path: install_tokenizer(TokenizerConfig(vocab_size=420), make_documents(400), 0, path.parent).rename(
            path
        ),
        "TokenizersBackend",
    ),
    "llama.model": (like_llama, "TokenizersBackend"),
    "compacted.model": (compacted, "TokenizersBackend"),
    "extra-spaces.model": (lambda path: train("bpe", path, byte_fallback=True), "SentencePieceBackend"),
    "unigram.model": (lambda path: train("unigram", path, byte_fallback=True), "SentencePieceBackend"),
    "unknown.model": (lambda path: train("bpe", path), "SentencePieceBackend"),
}


@pytest.mark.parametrize("name", KINDS)
def test_ids_are_those_of_our_own_reading(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    make, kind = KINDS[name]
    path = tmp_path / name
    make(path)
    folder = tmp_path / "out"
    folder.mkdir()
    end = export_tokenizer(path, None, 128, folder)
    ours = open_tokenizer(path, None)
    for family in sorted({"llama", "mistral", "qwen2"}.difference(misreading_families(path)), reverse=True):
        write_json(folder / "config.json", {"model_type": family})
        found = AutoTokenizer.from_pretrained(folder)
        assert type(found).__name__ == kind
        assert [found(text)["input_ids"] for text in TEXTS] == ours.encode_batch(TEXTS)
    assert (found.eos_token_id, found.bos_token_id, len(found)) == (end, end, ours.vocab_size)
    assert (end, found.model_max_length) == (ours.end_of_document, 128)
    if kind == "TokenizersBackend":
        ids = ours.encode_batch(TEXTS)
        assert [found.decode(each) for each in ids] == [ours.decode(each) for each in ids]
    # What llama.cpp reads: it takes the pieces of a tokenizer.json for ones without scores.
    beside = folder / "tokenizer.model"
    assert beside.read_bytes() == path.read_bytes() if path.suffix == ".model" else not beside.exists()
    # What transformers would read otherwise in a folder of another family.
    assert misreading_families(path) == (("qwen2",) if kind == "TokenizersBackend" else ("qwen2", "mistral"))


def test_a_tokenizer_that_adds_tokens_adds_none(tmp_path: Path) -> None:
    path = install_tokenizer(TokenizerConfig(vocab_size=300), make_documents(100), 0, tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.enable_truncation(2)
    tokenizer.save(str(path))
    (tmp_path / "out").mkdir()
    export_tokenizer(path, None, None, tmp_path / "out")
    exported = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert exported.encode("the model").ids == open_tokenizer(path, None).encode_batch(["the model"])[0]


def test_ties_that_a_text_could_offer_at_once_are_no_exact_conversion(tmp_path: Path) -> None:
    like_llama(tmp_path / "m.model")
    proto = sentencepiece_model.ModelProto.FromString((tmp_path / "m.model").read_bytes())
    assert converts_exactly(proto)
    scores = {entry.piece: entry for entry in proto.pieces}
    # "th" then "he": a text with "the" offers both.
    for piece in ("th", "he"):
        if piece not in scores:
            proto.pieces.add(piece=piece, score=0.5, type=1)
        else:
            scores[piece].score = 0.5
    assert not converts_exactly(proto)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="real tokenizers and text are not here")
@pytest.mark.parametrize(
    ("name", "is_exact"),
    [("internlm2_92k", True), ("chinese_llama2_55k", False), ("llama_32k", True), ("spm_test_1k", False)],
)
def test_real_models_convert_where_it_is_exact(name: str, is_exact: bool) -> None:
    path = SHARED / "tokenizers" / f"{name}.model"
    proto = sentencepiece_model.ModelProto.FromString(path.read_bytes())
    assert converts_exactly(proto) == is_exact
    if not is_exact:
        return
    texts = list(TEXTS)
    for file in sorted((SHARED / "corpus").glob("*.jsonl")):
        with file.open() as lines:
            texts += [json.loads(line)["text"][:2000] for line, _ in zip(lines, range(40), strict=False)]
    ours, converted = open_tokenizer(path, None), convert(proto)
    converted.encode_special_tokens = True
    ids = ours.encode_batch(texts)
    assert [entry.ids for entry in converted.encode_batch(texts, add_special_tokens=False)] == ids
    assert [converted.decode(each, skip_special_tokens=False) for each in ids] == [ours.decode(each) for each in ids]
