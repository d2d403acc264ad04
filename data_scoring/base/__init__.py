"""Atomic files, Parquet files with fingerprints, SQL helpers, progress. It imports no other room."""
