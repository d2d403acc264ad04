"""Tokenizers and their vocabularies, whatever the library."""
