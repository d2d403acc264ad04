"""Contamination: which evaluation items the training text contains. It reads the corpus, not losses or mixes."""
