"""Import, export and vocabulary pruning of models and tokenizers. It launches no ranks."""
