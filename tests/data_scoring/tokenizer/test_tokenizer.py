from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from data_scoring.config import TokenizerConfig
from data_scoring.corpus.tokenise import _encode
from data_scoring.tokenizer.tokenizer import Tokenizer, install_tokenizer, open_tokenizer
from tests.conftest import make_documents

TEXTS = ["naïve café, 中文和 English", "def f(x):\n\treturn x  # 😀", "  spaces  ", "<|endoftext|> is text here"]
SHARED = Path("../shared/tokenizers")


@pytest.fixture(scope="module")
def trained_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    return install_tokenizer(TokenizerConfig(vocab_size=320), make_documents(200), 0, folder)


def test_a_trained_tokenizer_round_trips_any_text(trained_path: Path) -> None:
    tokenizer = open_tokenizer(trained_path, None)
    assert tokenizer.vocab_size == 320
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(TEXTS)] == TEXTS
    assert tokenizer.decode_batch([*tokenizer.encode_batch(TEXTS), []]) == [*TEXTS, ""]
    assert tokenizer.decode_batch([]) == []
    assert tokenizer.decode([tokenizer.end_of_document]) == "<|endoftext|>"


def test_the_end_of_document_comes_from_documents_ends_alone(trained_path: Path) -> None:
    tokenizer = open_tokenizer(trained_path, None)
    for ids in _encode(TEXTS, tokenizer):
        assert ids.count(tokenizer.end_of_document) == 1
        assert ids[-1] == tokenizer.end_of_document


def test_long_documents_are_tokenised_in_pieces_that_add_up(trained_path: Path) -> None:
    tokenizer = open_tokenizer(trained_path, None)
    long = "\n".join(make_documents(8000))
    assert len(long) > 1 << 20
    [ids] = _encode([long], tokenizer)
    assert tokenizer.decode(ids[:-1]) == long


def test_training_is_reproducible_and_bounded_by_a_sample(tmp_path: Path) -> None:
    contents = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        config = TokenizerConfig(vocab_size=300, train_megabytes=0.005)
        contents.add(install_tokenizer(config, make_documents(500), 7, tmp_path / name).read_bytes())
    assert len(contents) == 1


def test_sentencepiece_models_are_used_as_they_are(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make_documents(500)), model_prefix=str(tmp_path / "m"), vocab_size=300,
        byte_fallback=True, model_type="bpe", minloglevel=2, hard_vocab_limit=False, user_defined_symbols=["<end>"],
    )  # fmt: skip
    tokenizer = open_tokenizer(tmp_path / "m.model", None)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    assert tokenizer.encode_batch(TEXTS) == [processor.encode(text) for text in TEXTS]
    batch = [*tokenizer.encode_batch(TEXTS), []]
    assert tokenizer.decode_batch(batch) == [*(processor.decode(ids) for ids in batch[:-1]), ""]
    assert tokenizer.decode_batch([]) == []
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (processor.vocab_size(), processor.eos_id())
    assert open_tokenizer(tmp_path / "m.model", "<end>").end_of_document == processor.piece_to_id("<end>")


_EMPTY = tokenizers.Tokenizer(tokenizers.models.BPE()).to_str()


@pytest.mark.parametrize(
    ("name", "content", "end", "message"),
    [
        ("none.json", None, None, r"tokenizer.path: .*none.json: no such file"),
        ("bad.json", "{}", None, r"bad.json: not a tokenizer.json"),
        ("empty.json", _EMPTY, None, r"empty.json: has none of the tokens <\|endoftext\|>, "),
        ("bad.model", "junk", None, r"bad.model: not a SentencePiece model"),
        ("vocab.txt", "junk", None, r"vocab.txt: ends in neither .json nor .model"),
    ],
)
def test_what_is_no_tokenizer_is_named(
    tmp_path: Path, name: str, content: str | None, end: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        open_tokenizer(tmp_path / name, end)


def test_an_end_of_document_that_cannot_be_found_is_named(tmp_path: Path, trained_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer.end_of_document: '<end>' is not a token of"):
        open_tokenizer(trained_path, "<end>")
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, "[UNK]"))
    plain.save(str(tmp_path / "plain.json"))
    with pytest.raises(ValueError, match=r"name its end token in tokenizer\.end_of_document"):
        open_tokenizer(tmp_path / "plain.json", None)


@pytest.mark.skipif(not SHARED.exists(), reason="real tokenizers are not here")
@pytest.mark.parametrize(
    ("name", "vocab_size", "round_trips"),
    [
        ("internlm2_92k.model", 92_544, True),
        ("chinese_llama2_55k.model", 55_296, True),
        ("llama_32k.model", 32_000, True),
        ("minimind_6k_tokenizer.json", 6400, True),
        ("spm_test_1k.model", 1000, False),
    ],
)
def test_real_tokenizers_open(name: str, vocab_size: int, round_trips: bool) -> None:
    tokenizer: Tokenizer = open_tokenizer(SHARED / name, None)
    assert tokenizer.vocab_size == vocab_size
    if round_trips:
        texts = TEXTS[:2]
        assert [tokenizer.decode(ids).strip() for ids in tokenizer.encode_batch(texts)] == texts
