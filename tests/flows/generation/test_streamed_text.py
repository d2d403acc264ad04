"""Text is shown character by character, in any script, whatever its tokens are."""

from pathlib import Path

import pytest
import tokenizers
from sentencepiece import SentencePieceTrainer
from tokenizers import decoders
from tokenizers.models import BPE

from data_scoring.config import TokenizerConfig
from data_scoring.tokenizer.tokenizer import Tokenizer, install_tokenizer, open_tokenizer
from flows.generation.streamed_text import StreamedText

TEXTS = [
    "plain words, and more words",
    "床前明月光，疑是地上霜",
    "Привет, мир",
    "a 🙂 and 👩‍👩‍👧",
    " two  spaces ",
    "line\nline",
]


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    if request.param == "byte-level":
        # Chinese characters are three tokens each.
        return open_tokenizer(install_tokenizer(TokenizerConfig(vocab_size=280), ["plain words"] * 9, 0, folder), None)
    (folder / "text").write_text("plain words, and more words\nand so on\n" * 50)
    SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "m"), vocab_size=290, byte_fallback=True,
        model_type="bpe", normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    return open_tokenizer(folder / "m.model", None)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_hold_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    prompt = "plain words"
    [before, whole] = tokenizer.encode_batch([prompt, prompt + text])
    # Tokens of the text itself, if the tokenizer merges none with the prompt's.
    new = whole[len(before) :] if whole[: len(before)] == before else tokenizer.encode_batch([text])[0]
    streamed = StreamedText(tokenizer, before)
    pieces = [streamed.add([token], is_over=False) for token in new]
    assert "".join(pieces) == streamed.text
    assert "\ufffd" not in streamed.text
    assert f"{prompt}{streamed.text}" == tokenizer.decode([*before, *new])
    if text.startswith("床"):
        assert pieces.count("") == 2 * sum(ord(letter) > 0x2000 for letter in text)


def test_what_ends_within_a_character_is_left_out(tokenizer: Tokenizer) -> None:
    [prompt, text] = tokenizer.encode_batch(["plain", "月光"])
    streamed = StreamedText(tokenizer, prompt)
    streamed.add(text[:-1], is_over=True)
    assert streamed.text.strip() == "月"
    assert streamed.is_over


def test_bytes_that_are_no_character_are_shown_once_something_follows(tokenizer: Tokenizer) -> None:
    [moon, word] = tokenizer.encode_batch(["月", "plain"])
    streamed = StreamedText(tokenizer, word)
    assert streamed.add(moon[:-1]) in ("", " ")
    assert "\ufffd" in streamed.add(word)
    assert streamed.text.replace("\ufffd", "").strip() == "plain"


def test_a_text_that_begins_after_the_end_of_a_document(tokenizer: Tokenizer) -> None:
    [text] = tokenizer.encode_batch(["plain words"])
    streamed = StreamedText(tokenizer, [tokenizer.end_of_document])
    streamed.add(text)
    assert streamed.text == "plain words"


def test_nothing_is_lost_after_bytes_that_change_what_is_before_them(tmp_path: Path) -> None:
    vocabulary = {"<|endoftext|>": 0, **{f"<0x{byte:02X}>": 1 + byte for byte in range(256)}, "plain": 257}
    own = tokenizers.Tokenizer(BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    own.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    own.save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(tmp_path / "tokenizer.json", "<|endoftext|>")
    moon = [1 + byte for byte in "月".encode()]
    streamed = StreamedText(tokenizer, [257])
    pieces = [streamed.add([token]) for token in [*moon, *moon]]
    assert "".join(pieces) == streamed.text == "月月"
    # A first byte without the others: the decoder then shows none of the six.
    streamed.add(moon[:1])
    assert streamed.text == "月月"
    assert streamed.add([257]).endswith("plain")
    streamed.add([257], is_over=True)
    assert streamed.text == tokenizer.decode([257, *moon, *moon, moon[0], 257, 257]).removeprefix("plain")
