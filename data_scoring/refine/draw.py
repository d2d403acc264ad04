"""The paper's draw without replacement, as keys, of which the N0 highest are kept.

Source: arXiv 2402.02791, "Multiple-Round Training".

Within each shard, N0 of N samples with p_i = exp(l_i / T) / sum_j exp(l_j / T). Keeping the N0 largest of
l_i / T - ln(-ln U_i), U_i uniform, is exactly that draw (Gumbel-top-k; Kool et al. 2019, arXiv 1903.06059).
"""

from data_scoring.base.sql import gumbel


def draw_key(score: str, temperature: float, bits: str) -> str:
    """Return the SQL of a sample's key, a double: `score` / `temperature` + Gumbel noise; at temperature 0, the score.

    `score` and `bits` are SQL expressions; `bits` are the sample's 64 random bits.
    """
    key = f"({score})::double"
    return f"{key} / {temperature!r}::double + {gumbel(bits)}" if temperature > 0 else key


def num_kept(num_samples: int, sampling_rate: float) -> int:
    """Return N0, the number of kept samples: `num_samples` times the sampling rate, rounded, and at least one."""
    return max(1, int(num_samples * sampling_rate + 0.5))
