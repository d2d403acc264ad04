"""The paper's draw without replacement, as keys.

Source: arXiv 2402.02791, "Multiple-Round Training".

The N0 samples with the highest keys are kept. Within each shard, or part of the training order, the draw is of N0 of N
samples with p_i = exp(l_i / T) / sum_j exp(l_j / T). Keeping the N0 largest of l_i / T - ln(-ln U_i), U_i uniform, is
exactly that draw (Gumbel-top-k; Kool et al. 2019, arXiv 1903.06059).
"""

from data_scoring.base.sql import gumbel


def draw_key(score: str, temperature: float, bits: str) -> str:
    """Return the SQL of a sample's key, a double: `score` / `temperature` + Gumbel noise; at temperature 0, the score.

    `score` and `bits` are SQL expressions; `bits` are the sample's 64 random bits.
    """
    return f"{log_weight_of(score, temperature)} + {gumbel(bits)}" if temperature > 0 else f"({score})::double"


def log_weight_of(score: str, temperature: float) -> str:
    """Return the SQL of a sample's key without noise, `score` / `temperature`, a double."""
    return f"({score})::double / {temperature!r}::double"


def inclusion_probability(log_weight: str, threshold: float | None) -> str:
    """Return the SQL of the probability that a key exceeds `threshold`: 1 - exp(-exp(log_weight - threshold)).

    With the largest key that is not kept as threshold, the sum over the kept samples of a quantity divided by this is
    an unbiased estimate of its sum over all (Kool et al. 2019, arXiv 1903.06059, on importance-weighted estimators).
    None: all are kept.
    """
    if threshold is None:
        return "1.0::double"
    rate = f"exp(least({log_weight} - '{threshold!r}'::double, 50))"
    # The difference from 1 would lose the digits of small probabilities.
    return f"case when {rate} < 1e-5 then {rate} * (1 - {rate} / 2) else 1 - exp(-{rate}) end"


def num_kept(num_samples: int, sampling_rate: float) -> int:
    """Return N0, the number of kept samples: `num_samples` times the sampling rate, rounded, and at least one."""
    return max(1, int(num_samples * sampling_rate + 0.5))
