"""Models and tokenizers that are imported, exported or pruned. It launches no ranks."""
