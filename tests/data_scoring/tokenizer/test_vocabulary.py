"""Pruned vocabularies, checked with the libraries: every kept token is produced and every text is decoded."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from data_scoring.config import SourceConfig, TokenizerConfig
from data_scoring.corpus.sources import read_documents
from data_scoring.tokenizer.pieces import merge, parts_of
from data_scoring.tokenizer.token_coverage import choose_tokens, measure_curve, size_for_coverage
from data_scoring.tokenizer.tokenizer import Tokenizer, install_tokenizer, open_tokenizer, read_tokenizer
from data_scoring.tokenizer.vocabulary import open_vocabulary
from tests.conftest import make_documents

SHARED = Path("../shared")
ENDS = {"gpt2_encoder.json": "<|endoftext|>"}
_HAN = "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能"
# What a JSONL may hold: no lone surrogates, but all else.
_ODD = [
    "\x00", "\ufeff", "\x1b[0m", "\r\n", "\t\t", " " * 300, "\u200b", "\u0301\u0301", "😀👩\u200d👩\u200d👧", "ﷺ",
    "\U000e0041", "▁", "<0x41>", "</s>", "<unk>", "<|endoftext|>", "한국어", "العربية", "ＡＢＣ１２", "½²",
    "\ud7ff\ue000\uffff",
]  # fmt: skip


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Return English, Chinese and code, line by line."""
    generator = random.Random(seed)
    chinese = ["".join(generator.choices(_HAN, weights=range(len(_HAN), 0, -1), k=30)) + "。" for _ in range(count)]
    code = [
        f"    def {generator.choice('abc')}_{number}(self, x):\n\t\treturn x + {number}  # 注释"
        for number in range(count)
    ]
    return [text for texts in zip(make_documents(count, seed), chinese, code, strict=True) for text in texts]


def make_odd_texts(count: int, seed: int) -> list[str]:
    """Return texts that mix all that there is, some of it malformed, in random order."""
    generator = random.Random(seed)
    pieces = [*_ODD, *"abc XYZ 0123 {}();:'\"\n\t", *_HAN[:10], *make_texts(3, seed)]

    def piece() -> str:
        point = generator.randrange(0x30000)
        is_character = not 0xD800 <= point < 0xE000 and generator.random() < 0.1
        return chr(point) if is_character else generator.choice(pieces)

    return ["".join(piece() for _ in range(generator.randint(1, 12))) for _ in range(count)]


def train_sentencepiece(path: Path, kind: str, byte_fallback: bool) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make_texts(400)), model_prefix=str(path.with_suffix("")), vocab_size=900,
        model_type=kind, byte_fallback=byte_fallback, user_defined_symbols=["<end>", "的一"], pad_id=3,
        character_coverage=0.999, hard_vocab_limit=False, minloglevel=2,
        normalization_rule_name="nfkc" if kind == "unigram" else "identity",
    )  # fmt: skip


def train_byte_level(path: Path, ignore_merges: bool = False) -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<|endoftext|>", "<pad>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(make_texts(400), trainer)
    # Behind the model's own, as chat templates add them.
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 900), ("<|im_end|>", 901)]
    )
    tokenizer.enable_padding(pad_id=1, pad_token="<pad>")
    tokenizer.save(str(path))


def train_llama_like(path: Path, has_bytes: bool = True) -> None:
    """Train characters with byte fallback, as LLaMA's tokenizer.json has it.

    Without bytes it falls back to nothing, its template names a token of the model's own, and, as in old files, the
    model's kind is not said.
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256) if has_bytes)]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(make_texts(400), trainer)
    content = json.loads(tokenizer.to_str())
    # As in the real ones, bytes are plain tokens.
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    # Older files write a merge as one string.
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    if not has_bytes:
        del content["model"]["type"]
        piece, token = max(content["model"]["vocab"].items(), key=lambda item: item[1])
        template = {"id": piece, "ids": [token], "tokens": [piece]}
        content["post_processor"] = {
            "type": "TemplateProcessing", "pair": [], "special_tokens": {piece: template},
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": piece, "type_id": 0}}],
        }  # fmt: skip
    path.write_text(json.dumps(content))


MAKERS: dict[str, Callable[[Path], None]] = {
    "bytes.json": train_byte_level,
    "words.json": lambda path: train_byte_level(path, ignore_merges=True),
    "llama.json": train_llama_like,
    "no-bytes.json": lambda path: train_llama_like(path, has_bytes=False),
    "bpe.model": lambda path: train_sentencepiece(path, "bpe", True),
    "bpe-unknown.model": lambda path: train_sentencepiece(path, "bpe", False),
    "unigram.model": lambda path: train_sentencepiece(path, "unigram", True),
    "unigram-unknown.model": lambda path: train_sentencepiece(path, "unigram", False),
}


@pytest.fixture(scope="module", params=MAKERS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / request.param
    MAKERS[request.param](path)
    return path


def count(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    ids = [token for ids in tokenizer.encode_batch(texts) for token in ids]
    return np.bincount(ids, minlength=tokenizer.vocab_size)


def cut(path: Path, size: int, counts: np.ndarray, folder: Path) -> tuple[Tokenizer, list[int]]:
    """Return the tokenizer of `size` made from that in `path`, and the old ids of its tokens."""
    vocabulary = open_vocabulary(path)
    kept = choose_tokens(vocabulary, counts, size).kept
    target = folder / f"{size}{path.suffix}"
    vocabulary.save(kept, target)
    cut = open_tokenizer(target, ENDS.get(path.name))
    assert (len(kept), cut.vocab_size) == (size, size)
    return cut, kept


def sizes_of(path: Path) -> list[int]:
    """Return the smallest size, some between, and the whole."""
    vocabulary = open_vocabulary(path)
    least, most = len(vocabulary.required), sum(piece is not None for piece in vocabulary.pieces)
    return [least, least + (most - least) // 10, least + (most - least) // 2, most]


def encode_pieces(path: Path, pieces: list[str]) -> list[list[int]]:
    """Return what each piece is encoded to by itself, by the library, with nothing put before it or split."""
    if path.suffix == ".json":
        model = tokenizers.Tokenizer.from_buffer(read_tokenizer(path)).model
        return [[token.id for token in model.tokenize(piece)] for piece in pieces]
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    proto.normalizer_spec.add_dummy_prefix = proto.normalizer_spec.remove_extra_whitespaces = False
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    ids: list[list[int]] = processor.encode([piece.replace("▁", " ") for piece in pieces])
    return ids


def check_kept_tokens_are_reached(path: Path, small: Path, kept: list[int]) -> float:
    """Check that what led to each kept token still does; return the share of the ordinary ones where it did."""
    vocabulary = open_vocabulary(path)
    pieces = [str(vocabulary.pieces[token]) for token in kept]
    reached = [
        (old == [token], new == [number])
        for number, (token, old, new) in enumerate(
            zip(kept, encode_pieces(path, pieces), encode_pieces(small, pieces), strict=True)
        )
    ]
    assert [pieces[number] for number, (before, after) in enumerate(reached) if before and not after] == []
    ordinary = [number for number, token in enumerate(kept) if token not in vocabulary.required]
    return sum(reached[number][1] for number in ordinary) / max(1, len(ordinary))


def test_kept_tokens_are_reached_and_texts_come_back(path: Path, tmp_path: Path) -> None:
    whole = open_tokenizer(path, None)
    texts = make_texts(100, seed=1)
    counts = count(whole, texts)
    odd = make_odd_texts(300, seed=2)
    lines = [line for text in texts for line in text.split()]
    expected = [whole.decode(ids) for ids in whole.encode_batch([*odd, *texts])]
    for size in sizes_of(path):
        small, kept = cut(path, size, counts, tmp_path)
        assert [small.decode(ids) for ids in small.encode_batch([*odd, *texts])] == expected
        share = check_kept_tokens_are_reached(path, tmp_path / f"{size}{path.suffix}", kept)
        # The test would be empty if few tokens could be reached in the first place.
        assert share > 0.95 or size == sizes_of(path)[0]
        # Texts made of kept tokens alone are encoded as before, in new numbers.
        new = {old: number for number, old in enumerate(kept)}
        pairs = zip(whole.encode_batch(lines), small.encode_batch(lines), strict=True)
        same = [[new[token] for token in old] == ids for old, ids in pairs if set(old) <= new.keys()]
        assert all(same)
        assert len(same) > 100 or size == sizes_of(path)[0]
    # The whole vocabulary is the same tokenizer.
    assert small.encode_batch(odd) == whole.encode_batch(odd)


def test_merges_are_made_in_their_order_and_undone_last_first(path: Path) -> None:
    """Our own merging against the library's, where pieces are what merges make."""
    if path.name not in ("bytes.json", "llama.json", "bpe.model"):
        pytest.skip("no merges, or not these alone")
    vocabulary = open_vocabulary(path)
    for token, needs in enumerate(vocabulary.needs):
        piece = vocabulary.pieces[token]
        if token not in vocabulary.required and len(str(piece)) > 1:
            assert "".join(str(vocabulary.pieces[need]) for need in needs) == piece


def test_merge_takes_the_first_best_pair() -> None:
    ranks = {("a", "b"): 1.0, ("b", "a"): 0.0, ("ab", "c"): 3.0, ("a", "ba"): 2.0}

    def priority(left: str, right: str) -> float | None:
        return ranks.get((left, right))

    assert merge(list("aba"), priority) == (["aba"], ("a", "ba"))
    assert merge(list("abc"), priority) == (["abc"], ("ab", "c"))
    assert merge(list("xyz"), priority) == (list("xyz"), None)
    assert parts_of("abc", list("abc"), priority) == ["ab", "c"]
    assert parts_of("xyz", list("xyz"), priority) == ["x", "y", "z"]
    assert parts_of("x", ["x"], priority) == []


def test_the_curve_is_what_tokenising_again_gives(path: Path, tmp_path: Path) -> None:
    whole = open_tokenizer(path, None)
    texts = make_texts(150, seed=1)
    counts = count(whole, texts)
    curve = measure_curve(open_vocabulary(path), counts)
    for size in sizes_of(path)[1:]:
        small, kept = cut(path, size, counts, tmp_path)
        at = size - curve.sizes[0]
        again = sum(len(ids) for ids in small.encode_batch(texts)) / counts.sum()
        # Merges that others make room for shorten the text a little; unknown characters are merged into one.
        assert curve.lengths[at] == pytest.approx(again, rel=0.03)
        assert curve.coverage[at] == pytest.approx(counts[kept].sum() / counts.sum(), abs=0.03)
    assert (curve.lengths[-1], curve.coverage[-1]) == (1, pytest.approx(1))
    least = size_for_coverage(curve, 0.9)
    assert counts[choose_tokens(open_vocabulary(path), counts, least).tokens].sum() >= 0.9 * counts.sum()
    assert least == curve.sizes[-1] or least % 128 == 0


def test_special_tokens_keep_their_roles(tmp_path: Path) -> None:
    train_sentencepiece(tmp_path / "a.model", "bpe", True)
    old = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "a.model"))
    cut(tmp_path / "a.model", 400, np.arange(old.vocab_size()), tmp_path)
    new = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "400.model"))
    for name in ("unk_id", "bos_id", "eos_id", "pad_id"):
        assert new.id_to_piece(getattr(new, name)()) == old.id_to_piece(getattr(old, name)())
    assert new.encode("<end>")[-1] == new.piece_to_id("<end>") != new.unk_id()
    train_byte_level(tmp_path / "b.json")
    cut(tmp_path / "b.json", 400, np.arange(902), tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "400.json"))
    encoded = library.encode_batch(["a", "a b c d"])[0]
    assert encoded.tokens[0] == "<|im_start|>"
    assert [library.id_to_token(token) for token in encoded.ids] == encoded.tokens
    assert {"<pad>", "<|im_end|>"} <= set(encoded.tokens)
    assert library.token_to_id("<|im_end|>") == 399


class Fake:
    """Tokens with needs, as given."""

    def __init__(self, required: dict[int, str], needs: list[tuple[int, ...]]) -> None:
        self.pieces: list[str | None] = [str(token) for token in range(len(needs))]
        self.required, self.needs = required, needs


def test_what_does_not_fit_is_left_out_and_the_next_taken() -> None:
    # 5 needs 3 and 4, of which 4 needs 2; 6 needs nothing.
    vocabulary = Fake({0: "control", 1: "byte"}, [(), (), (), (), (2, 3), (3, 4), ()])
    counts = np.array([0, 0, 1, 2, 3, 9, 1])
    chosen = {size: choose_tokens(vocabulary, counts, size).tokens for size in range(2, 8)}  # type: ignore[arg-type]
    assert chosen == {
        2: [0, 1], 3: [0, 1, 3], 4: [0, 1, 3, 2], 5: [0, 1, 3, 2, 4],
        6: [0, 1, 3, 2, 4, 5], 7: [0, 1, 3, 2, 4, 5, 6],
    }  # fmt: skip
    reasons = choose_tokens(vocabulary, counts, 6).reasons  # type: ignore[arg-type]
    assert reasons == {0: "control", 1: "byte", 2: "merge path", 3: "merge path", 4: "merge path", 5: "frequent"}


def test_sizes_that_cannot_be_are_named(tmp_path: Path) -> None:
    train_byte_level(tmp_path / "t.json")
    vocabulary = open_vocabulary(tmp_path / "t.json")
    none = np.zeros(902, np.int64)
    with pytest.raises(
        ValueError, match=r"size 100 is too small: 260 tokens are required \(4 added token, 256 alphabet"
    ):
        choose_tokens(vocabulary, none, 100)
    with pytest.raises(ValueError, match=r"size 903 is more than the tokenizer's 902"):
        choose_tokens(vocabulary, none, 903)
    curve = measure_curve(vocabulary, np.ones(902, np.int64))
    for coverage in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"coverage: .* is not above 0 and at most 1"):
            size_for_coverage(curve, coverage)
    assert size_for_coverage(curve, 1.0) == 902


def test_tokenizers_of_other_kinds_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "wordpiece.json"
    tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")).save(str(other))
    with pytest.raises(ValueError, match=r"wordpiece.json: its model is WordPiece; give a BPE tokenizer"):
        open_vocabulary(other)
    suffixed = tmp_path / "suffixed.json"
    tokenizers.Tokenizer(tokenizers.models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>")).save(str(suffixed))
    with pytest.raises(ValueError, match=r"suffixed.json: its model has end_of_word_suffix '</w>'"):
        open_vocabulary(suffixed)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c"] * 9), model_prefix=str(tmp_path / "c"), vocab_size=7, model_type="char",
        minloglevel=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"c.model: its model is CHAR; give a BPE or unigram model"):
        open_vocabulary(tmp_path / "c.model")


@pytest.mark.skipif(not SHARED.exists(), reason="real tokenizers are not here")
@pytest.mark.parametrize(
    "name",
    [
        "spm_test_1k.model",
        "minimind_6k_tokenizer.json",
        pytest.param("gpt2_encoder.json", marks=pytest.mark.slow),
        pytest.param("llama_32k.model", marks=pytest.mark.slow),
        pytest.param("chinese_llama2_55k.model", marks=pytest.mark.slow),
        pytest.param("internlm2_92k.model", marks=pytest.mark.slow),
    ],
)
def test_real_tokenizers_are_cut_down(name: str, tmp_path: Path) -> None:
    path = SHARED / "tokenizers" / name
    whole = open_tokenizer(path, ENDS.get(name))
    sources = [SourceConfig(name=file.stem, path=str(file)) for file in sorted((SHARED / "corpus").glob("*.jsonl"))]
    texts = [text for source in sources for text in list(read_documents(source, lambda *_: None))[:20]]
    counts = count(whole, texts)
    odd = [*make_odd_texts(200, seed=3), *texts[::10]]
    expected = [whole.decode(ids) for ids in whole.encode_batch(odd)]
    for size in sizes_of(path)[1:3]:
        small, kept = cut(path, size, counts, tmp_path)
        assert [small.decode(ids) for ids in small.encode_batch(odd)] == expected
        assert check_kept_tokens_are_reached(path, tmp_path / f"{size}{path.suffix}", kept) > 0.9


def test_the_pair_of_gpt2_is_read_as_one_tokenizer(tmp_path: Path) -> None:
    train_byte_level(tmp_path / "whole.json")
    content = json.loads((tmp_path / "whole.json").read_text())["model"]
    (tmp_path / "my_encoder.json").write_text(json.dumps(content["vocab"]))
    with pytest.raises(ValueError, match=r"a vocabulary without merges: 0 files such as my_vocab.bpe"):
        open_tokenizer(tmp_path / "my_encoder.json", None)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in content["merges"])]
    (tmp_path / "my_vocab.bpe").write_text("\n".join(lines) + "\n")
    texts = make_texts(20, seed=4)
    pair, whole = (open_tokenizer(tmp_path / name, None) for name in ("my_encoder.json", "whole.json"))
    assert pair.encode_batch(texts) == whole.encode_batch(texts)
    assert [pair.decode(ids) for ids in pair.encode_batch(texts)] == texts
    assert pair.end_of_document == 0
    installed = install_tokenizer(TokenizerConfig(path=str(tmp_path / "my_encoder.json")), [], 0, tmp_path)
    assert installed.name == "tokenizer.json"
    assert open_tokenizer(installed, None).encode_batch(texts) == whole.encode_batch(texts)
    assert json.loads(read_tokenizer(tmp_path / "my_encoder.json"))["model"]["vocab"] == content["vocab"]
