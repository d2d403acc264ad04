"""Evaluation items and the table of tasks. This room imports only `data_scoring.base`."""
