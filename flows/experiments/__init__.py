"""Experiments: many runs compared, each a run folder like any other."""
