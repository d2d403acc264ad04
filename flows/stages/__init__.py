"""The stages of a run, a file each: what a stage needs, what decides its result, when it is asked for, and the work.

No HTML, no Prefect.
"""
