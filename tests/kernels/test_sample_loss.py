import torch

from kernels.sample_loss import sum_per_sample


def test_padding_counts_nothing_even_where_it_is_not_finite() -> None:
    losses = torch.tensor([[1.0, 2.0, 3.0], [4.0, float("nan"), float("inf")]])
    assert sum_per_sample(losses, torch.tensor([3, 1])).tolist() == [6.0, 4.0]
    assert sum_per_sample(losses, torch.tensor([0, 0])).tolist() == [0.0, 0.0]


def test_half_precision_is_summed_in_single() -> None:
    losses = torch.full((1, 4096), 1.0, dtype=torch.bfloat16)
    assert sum_per_sample(losses, torch.tensor([4096])).tolist() == [4096.0]
