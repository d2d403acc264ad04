"""Atomic files, Parquet files with fingerprints, SQL helpers, names from tables, progress. It imports no other room."""
