"""OpenCompass' metrics for base models that lm-eval lacks."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rouge_score.rouge_scorer import RougeScorer

_ROUGE = RougeScorer(["rouge1", "rouge2", "rougeL"])


def score_summary(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return ROUGE-1, -2 and -L F-measures (0 to 1) of the first line of a generated summary.

    As OpenCompass' `Xsum_postprocess` and RougeEvaluator, which uses the same library, without stemming.
    """
    summary = results[0].strip().split("\n")[0].strip()
    return {name: score.fmeasure for name, score in _ROUGE.score(doc["summary"], summary).items()}


def score_whole_text(log_likelihoods: Sequence[float], num_tokens: Sequence[int], gold: int) -> dict[str, float]:
    """Return whether the option whose whole text has the lowest mean loss is the right one (`acc_text`).

    log_likelihoods: of prompt and option together, nats, one per option. num_tokens: the tokens of these texts.
    As OpenCompass' PPLInferencer, whose mean also counts the token that is read before the first one (`get_ppl` of its
    HuggingFace models).
    """
    losses = -np.array(log_likelihoods) / (np.array(num_tokens) + 1)
    return {"acc_text": float(np.argmin(losses) == gold)}


_MEAN = {"aggregation": "mean", "higher_is_better": True}
# The metrics of these functions, as lm-eval's task definitions list them.
WHOLE_TEXT_METRICS = [{"metric": "acc_text", **_MEAN}]
SUMMARY_METRICS = [{"metric": name, **_MEAN} for name in ("rouge1", "rouge2", "rougeL")]
