"""Evaluation items and the table of tasks. It imports only `data_scoring.base`."""
