"""The stages of a run, one file each: when a stage applies, what it needs, what decides its result, and its work.

No HTML, no Prefect.
"""
