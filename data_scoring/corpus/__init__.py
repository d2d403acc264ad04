"""The corpus: sources, tokenisation, packing into shards, and reading samples back."""
