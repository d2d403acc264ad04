"""Benchmarks: each measures a claim against a named baseline in the same run."""
