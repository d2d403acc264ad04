"""Scores of answers as OpenCompass computes them for base models, where lm-eval has no such metric."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rouge_score.rouge_scorer import RougeScorer

_ROUGE = RougeScorer(["rouge1", "rouge2", "rougeL"])


def score_summary(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return ROUGE-1, -2 and -L F-measures (0 to 1) of the first line of a generated summary.

    After OpenCompass' `Xsum_postprocess` and RougeEvaluator, which is this library, words unstemmed.
    """
    summary = results[0].strip().split("\n")[0].strip()
    return {name: score.fmeasure for name, score in _ROUGE.score(doc["summary"], summary).items()}


def score_whole_text(log_likelihoods: Sequence[float], num_tokens: Sequence[int], gold: int) -> dict[str, float]:
    """Return whether the option is right with which the whole text has the least mean loss (`acc_text`).

    `log_likelihoods` are those of prompt and option together, in nats, an option each, and `num_tokens` their tokens.
    OpenCompass' PPLInferencer compares these means; the token that is read before the first counts, as it does there
    (`get_ppl` of its HuggingFace models).
    """
    losses = -np.array(log_likelihoods) / (np.array(num_tokens) + 1)
    return {"acc_text": float(np.argmin(losses) == gold)}


_MEAN = {"aggregation": "mean", "higher_is_better": True}
# What the functions return, as lm-eval's task definitions list it.
WHOLE_TEXT_METRICS = [{"metric": "acc_text", **_MEAN}]
SUMMARY_METRICS = [{"metric": name, **_MEAN} for name in ("rouge1", "rouge2", "rougeL")]
