"""The flows: what the user runs, and what Prefect schedules."""
