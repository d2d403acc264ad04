"""The device check: correctness, speed and memory of Reprise on a device, in at most ten minutes.

`python -m benchmarks.device prepare FOLDER` writes the inputs of the check, on a machine with all packages;
`python -m benchmarks.device run FOLDER --output OUTPUT` then runs it on a machine with torch and megatron-core.
"""
