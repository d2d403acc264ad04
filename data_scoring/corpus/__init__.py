"""Text to shards and back: sources, tokenisation, packing, reading."""
