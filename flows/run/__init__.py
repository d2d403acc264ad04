"""The state on disk: configuration, run folder, locks, errors, stored models.

It imports neither torch nor another room of flows.
"""
