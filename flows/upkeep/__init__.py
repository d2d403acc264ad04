"""Upkeep of run folders: forking a run, and deleting what nothing needs any more. It launches no ranks."""
