"""Characters that a tokenizer drops or does not know are found, all of them and no others."""

from pathlib import Path

import pytest

from data_scoring.tokenizer.tokenizer import open_tokenizer
from tests.conftest import make_documents
from tests.data_scoring.tokenizer.tokenizer_kinds import KINDS, make_kind

# Which tokenizers know every character, and which lose the whole word of one that they do not know.
_COMPLETE = {kind for kind in KINDS if kind.startswith("byte-level")} - {"byte-level-incomplete"}
_COMPLETE |= {"pattern", "llama", "sp-bpe-bytes", "sp-unigram-bytes", "sp-identity"}
_BY_WORD = {"word-piece"}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_lost_is_what_the_training_text_lacks(kind: str, tmp_path: Path) -> None:
    tokenizer = open_tokenizer(make_kind(kind, tmp_path), None)
    known = make_documents(20)
    odd = ["the 北京 model", "北京市", "the model 北x京", "the 🦄model", "北the the京"]
    expected = ["北京", "北京市", "北京", "🦄", "北京"]
    if kind in _BY_WORD:
        # It splits Chinese into characters, so that no other letters are lost.
        expected = ["北京", "北京市", "北京", "🦄model", "北京"]
    if kind in _COMPLETE:
        expected = [""] * len(odd)
    texts = [*known, *odd, ""]
    lost = tokenizer.find_lost(texts, tokenizer.encode_batch(texts))
    assert lost == [*([""] * len(known)), *expected, ""]
