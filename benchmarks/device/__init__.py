"""The check of a device: what Reprise computes there, how fast, and in how much memory, in ten minutes at most.

`python -m benchmarks.device prepare FOLDER` writes what the check needs, where all packages are installed;
`python -m benchmarks.device run FOLDER --output OUTPUT` then runs it where torch and megatron-core are.
"""
