"""The paper's published scores (arXiv 2402.02791), as its ICML 2024 poster prints them: percent, by OpenCompass.

docs/evaluation.md describes how they were checked.
"""

from collections.abc import Mapping

from data_scoring.evaluation.tasks import ABLATION_AVERAGE, AVERAGE, AVERAGES
from flows.evaluation.results_table import Row

# The table of results: the tasks in the order of `PAPER`, then their average.
_RESULTS = {
    "MobileLLaMA-1.4B": (23.93, 25.10, 25.05, 18.53, 58.75, 45.20, 71.27, 46.25, 18.19, 37.42, 36.97),
    "Sheared-LLaMA-1.3B": (24.28, 25.10, 25.77, 18.01, 62.39, 43.57, 72.91, 46.25, 16.44, 35.45, 37.02),
    "TinyLLaMA-1.1B": (27.85, 24.64, 25.75, 18.54, 56.06, 45.47, 70.62, 46.25, 20.15, 36.71, 37.20),
    "MobileLLaMA-2.7B": (23.53, 25.55, 26.63, 18.43, 54.74, 55.80, 72.85, 46.25, 16.96, 36.11, 37.69),
    "Chinese-LLaMA2-1.3B": (28.70, 24.78, 24.55, 19.40, 56.79, 47.46, 56.91, 72.50, 8.90, 43.12, 38.31),
    "RWKV-5-1.5B": (25.92, 25.14, 25.66, 19.01, 62.29, 54.05, 71.22, 46.25, 20.67, 49.15, 39.94),
    "Phi-1.3B": (27.78, 25.85, 44.32, 23.42, 73.52, 44.20, 76.99, 50.00, 14.90, 38.96, 41.99),
    "PanGu-π-1B": (36.85, 35.90, 35.96, 30.77, 58.44, 43.48, 61.92, 55.62, 15.92, 49.21, 42.41),
    "Open-LLaMA-3B": (27.50, 25.42, 27.09, 20.68, 60.58, 52.72, 77.09, 82.50, 19.75, 43.23, 43.66),
    "Phi2-2.7B": (31.86, 32.18, 58.49, 28.51, 77.40, 43.57, 78.89, 46.25, 13.66, 40.11, 45.09),
    "PanGu-π-1B Pro": (46.50, 46.56, 50.38, 41.58, 63.43, 53.99, 64.96, 74.38, 18.40, 52.66, 51.28),
    "Qwen-1.8B": (53.60, 52.12, 46.43, 35.83, 64.31, 57.79, 73.83, 88.12, 20.03, 58.30, 55.04),
    "PanGu-π-1.5B Pro": (52.39, 48.51, 62.54, 44.89, 70.61, 67.93, 79.55, 86.12, 24.61, 69.24, 60.64),
}
# The comparison of inheritance strategies: the tasks in the order of `ABLATION`, then their average.
_INHERITANCE = {
    "Base": (36.68, 40.34, 49.15, 42.06),
    "L1": (39.51, 47.70, 50.96, 46.06),
    "L2": (41.98, 48.33, 50.68, 47.00),
    "Taylor": (43.21, 48.43, 52.05, 47.90),
    "Learned": (40.74, 51.77, 51.73, 48.08),
}


def paper_rows() -> list[Row]:
    """Return the rows of the paper's table of results."""
    return _rows(_RESULTS, AVERAGE)


def inheritance_rows() -> list[Row]:
    """Return the rows of the paper's comparison of inheritance strategies."""
    return _rows({f"inheritance: {strategy}": scores for strategy, scores in _INHERITANCE.items()}, ABLATION_AVERAGE)


def _rows(published: Mapping[str, tuple[float, ...]], average: str) -> list[Row]:
    names = (*AVERAGES[average], average)
    return [Row(label, dict(zip(names, scores, strict=True)), {}, "quoted") for label, scores in published.items()]
