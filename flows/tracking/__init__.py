"""Sending what a run records to experiment trackers, from processes of their own that read the run folder.

No run waits for them. Only the module of a tracker imports its package. No torch.
"""
