import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from data_scoring.config import TokenizerConfig
from data_scoring.tokenizer import tokenizer as tokenizer_module
from data_scoring.tokenizer.tokenizer import HuggingFaceTokenizer, Tokenizer, install_tokenizer, open_tokenizer
from tests.conftest import make_documents
from tests.data_scoring.tokenizer.tokenizer_kinds import make_kind

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


@pytest.mark.parametrize("characters", [1, 50, 100_000])
def test_texts_that_are_encoded_in_several_steps_have_the_same_ids(
    characters: int, trained_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step has more characters than the limit, unless it is of one text."""
    tokenizer, library = HuggingFaceTokenizer(trained_path, None), tokenizers.Tokenizer.from_file(str(trained_path))
    library.encode_special_tokens = True
    texts = ["", *make_documents(50), "", *TEXTS]
    steps: list[list[str]] = []

    class Recording:
        def encode_batch_fast(self, step: list[str], **options: bool) -> list[tokenizers.Encoding]:
            steps.append(step)
            return library.encode_batch_fast(step, **options)

    monkeypatch.setattr(tokenizer_module, "_CHARACTERS_AT_ONCE", characters)
    monkeypatch.setattr(tokenizer, "_tokenizer", Recording())
    assert tokenizer.encode_batch(texts) == [library.encode(text, add_special_tokens=False).ids for text in texts]
    assert all(len(step) == 1 or sum(map(len, step)) <= characters for step in steps)
    assert (len(steps) == 1) == (characters == 100_000)
    assert tokenizer.encode_batch([]) == []


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
_PANICS = json.loads(_EMPTY)
_PANICS["model"] |= {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], "continuing_subword_prefix": "####"}
_FAR = json.dumps(json.loads(_EMPTY) | {"model": {"type": "BPE", "vocab": {"</s>": 0, "a": 1 << 30}, "merges": []}})
_NO_JSON, _NO_MODEL = (
    r": not a tokenizer\.json \(.+\); give one of",
    r": not a SentencePiece model \(.+\); give a \.model",
)


def damaged(name: str, folder: Path) -> bytes:
    """Return the content of a tokenizer file that something happened to."""
    whole = make_kind("sp-bpe" if name.endswith(".model") else "byte-level", folder).read_bytes()
    return {
        "half": whole[: len(whole) // 2],
        "overwritten": whole[:1000] + b"\0" * 50 + whole[1050:],
        "utf-16": whole.decode("latin-1").encode("utf-16"),
        "compressed": gzip.compress(whole),
    }[name.partition(".")[0]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.json", None, r"tokenizer\.path: .*none\.json: no such file"),
        ("no-object.json", b"[]", _NO_JSON),
        ("number.json", b"3", _NO_JSON),
        ("null.json", b"null", _NO_JSON),
        ("text.json", b"plain text", _NO_JSON),
        ("empty-object.json", b"{}", _NO_JSON),
        ("nothing.json", b"", _NO_JSON),
        ("nested.json", b"[" * 100_000, _NO_JSON),
        ("weights.json", b"\x80\x02\0\0", _NO_JSON),
        ("other.json", b'{"model_type": "llama", "hidden_size": 8}', _NO_JSON),
        ("panics.json", json.dumps(_PANICS).encode(), _NO_JSON),
        ("far.json", _FAR.encode(), r"the id 1073741824 is larger than any vocabulary"),
        ("no-end.json", _EMPTY.encode(), r": has none of the tokens <\|endoftext\|>, "),
        ("half.json", damaged, _NO_JSON),
        ("overwritten.json", damaged, _NO_JSON),
        ("utf-16.json", damaged, _NO_JSON),
        ("compressed.json", damaged, _NO_JSON),
        ("nothing.model", b"", _NO_MODEL),
        ("text.model", b"plain text", _NO_MODEL),
        ("weights.model", b"\x80\x02\0\0", _NO_MODEL),
        ("half.model", damaged, _NO_MODEL),
        ("overwritten.model", damaged, _NO_MODEL),
        ("compressed.model", damaged, _NO_MODEL),
        ("vocab.txt", b"plain text", r": ends in neither \.json nor \.model"),
    ],
)
def test_what_is_no_tokenizer_is_one_line_with_file_and_remedy(
    tmp_path: Path, name: str, content: bytes | Callable[[str, Path], bytes] | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content(name, tmp_path))
    with pytest.raises(ValueError, match=message) as error:
        open_tokenizer(tmp_path / name, None)
    assert name in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["weights.json", "weights.model"])
def test_a_file_of_another_kind_is_not_read_whole(name: str, tmp_path: Path) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=rf"{name}: 1048576 MB is more than a tokenizer has"):
        open_tokenizer(tmp_path / name, None)


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
