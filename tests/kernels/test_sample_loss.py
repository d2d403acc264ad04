import torch

from kernels.sample_loss import sum_per_packed_sample, sum_per_packed_sample_reference, sum_per_sample


def test_padding_counts_nothing_even_where_it_is_not_finite() -> None:
    losses = torch.tensor([[1.0, 2.0, 3.0], [4.0, float("nan"), float("inf")]])
    assert sum_per_sample(losses, torch.tensor([3, 1])).tolist() == [6.0, 4.0]
    assert sum_per_sample(losses, torch.tensor([0, 0])).tolist() == [0.0, 0.0]


def test_half_precision_is_summed_in_single() -> None:
    losses = torch.full((1, 4096), 1.0, dtype=torch.bfloat16)
    assert sum_per_sample(losses, torch.tensor([4096])).tolist() == [4096.0]


def test_packed_samples_are_summed_each_for_itself() -> None:
    losses = torch.rand(5000, generator=torch.Generator().manual_seed(0)) * 10
    losses[7] = float("nan")
    starts = torch.tensor([0, 7, 9, 9, 4000, 5000])
    sums = sum_per_packed_sample(losses, starts)
    torch.testing.assert_close(sums, sum_per_packed_sample_reference(losses, starts), rtol=0, atol=0, equal_nan=True)
    assert sums.isnan().tolist() == [False, True, False, False, False]
    assert sums[2] == 0
    assert sums[3] == losses[9:4000].double().sum().float()


def test_packed_samples_have_gradients() -> None:
    losses = torch.ones(5, requires_grad=True)
    sum_per_packed_sample(losses, torch.tensor([0, 2, 5])).backward(torch.tensor([1.0, 3.0]))
    assert losses.grad.tolist() == [1.0, 1.0, 3.0, 3.0, 3.0]
