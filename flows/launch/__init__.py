"""Launching: a job and a launch configuration in, an exit or an error out. It knows jobs, and no stage."""
