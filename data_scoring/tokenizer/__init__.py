"""Tokenizers of Hugging Face and SentencePiece, and their vocabularies."""
