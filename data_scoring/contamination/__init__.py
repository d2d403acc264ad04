"""Which evaluation items the training text contains. It reads the corpus, and neither losses nor mixes."""
