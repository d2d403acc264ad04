"""The study behind docs/study.md: in which regimes refining pays, with which policy; `python -m benchmarks.study`."""
