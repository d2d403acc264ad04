"""Random mistakes in what people and machines write: configurations, records and files.

A few hundred cases, always the same, are part of every test run; `pytest -m fuzz` tries 10,000 new ones of each
kind, or as many as the environment variable FUZZ_CASES says.
"""
