"""Prefect: wraps stages and experiments as flows and tasks. Decides nothing about data."""
