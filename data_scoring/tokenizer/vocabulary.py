"""Opening the vocabulary of a tokenizer of either library."""

from pathlib import Path

from data_scoring.tokenizer.pieces import Vocabulary


def open_vocabulary(path: Path) -> Vocabulary:
    """Return the vocabulary of the tokenizer in `path`. Raises ValueError if it cannot be pruned."""
    from data_scoring.tokenizer.vocabulary_bpe import HuggingFaceVocabulary
    from data_scoring.tokenizer.vocabulary_sentencepiece import SentencePieceVocabulary

    return SentencePieceVocabulary(path) if path.suffix == ".model" else HuggingFaceVocabulary(path)
