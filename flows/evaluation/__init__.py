"""Benchmark tasks: requests, answers, scores, tables. The only room that imports lm_eval."""
