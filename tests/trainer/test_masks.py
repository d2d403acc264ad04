"""Masks: exact sizes, the student's losses, and gradients and results independent of the layout."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.trainer.two_ranks_masks import GROUPED, LAYOUTS, NUM_SAMPLES, QUARTER, STUDENTS, TEACHERS
from trainer.masks import KINDS, Masks, keep_highest, relax
from trainer.pruning import PruningPlan

Found = list[dict[str, Any]]
JOB_LAYOUTS = ("data", "tensor", "pipeline")


@pytest.mark.parametrize("temperature", [5.0, 1.0, 0.1, 0.01])
@pytest.mark.parametrize("keep", [1, 7, 19])
def test_a_relaxation_sums_up_to_what_is_kept(temperature: float, keep: int) -> None:
    logits = torch.randn(4, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    soft = relax(logits, keep, temperature)
    torch.testing.assert_close(soft.sum(dim=1), torch.full((4,), float(keep), dtype=torch.float64), atol=1e-9, rtol=0)
    hard = keep_highest(logits, keep)
    assert (hard.sum(dim=1) == keep).all()
    for row in range(4):
        assert logits[row][hard[row] == 1].min() > logits[row][hard[row] == 0].max()
        assert soft[row][hard[row] == 1].min() > soft[row][hard[row] == 0].max()
    if temperature == 0.01:
        torch.testing.assert_close(soft.round(), hard)


def test_a_relaxation_s_gradient_is_that_of_finite_differences() -> None:
    """The threshold's share in it too: as much as one of them gains, the others lose."""
    logits = torch.randn(2, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda values: relax(values, 2, 0.7), logits)
    (gradient,) = torch.autograd.grad(relax(logits, 2, 0.7)[0, 3], logits)
    assert gradient[0].sum().item() == pytest.approx(0, abs=1e-12)
    assert gradient[0, 3] > 0.1
    everything = relax(logits, 6, 0.7)
    assert (everything == 1).all()


@pytest.mark.parametrize("name", TEACHERS)
def test_every_draw_keeps_exactly_the_student_s_size(name: str) -> None:
    teacher, student = TEACHERS[name], STUDENTS[name]
    masks = Masks(teacher, student)
    generator = torch.Generator().manual_seed(0)
    draws = [masks.draw(generator, temperature) for temperature in (2.0, 0.5, 0.05)]
    for hard, soft in draws:
        assert hard["channels"].sum() == student.hidden_size
        assert (hard["ffn"].sum(dim=1) == student.ffn_size).all()
        assert (hard["groups"].sum(dim=1) == student.num_groups).all()
        per_group = student.num_attention_heads // student.num_groups
        assert (hard["heads"].view(teacher.num_layers, teacher.num_groups, -1).sum(dim=2) == per_group).all()
        for kind in KINDS:
            torch.testing.assert_close(soft[kind].sum(dim=1), hard[kind].sum(dim=1))
    assert not torch.equal(draws[0][0]["ffn"], draws[1][0]["ffn"])


def losses(found: Found, key: str, what: str) -> dict[int, float]:
    return {row: loss for rank in found for row, loss in rank["masks"][key][what].items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", TEACHERS)
def test_a_masked_model_computes_what_the_sliced_one_does(name: str, layout: str, found: Found) -> None:
    masked, sliced = (losses(found, f"{name} {layout}", what) for what in ("masked", "sliced"))
    assert masked.keys() == sliced.keys() == set(range(NUM_SAMPLES))
    for row in range(NUM_SAMPLES):
        # Sums over 32 tokens.
        assert masked[row] == pytest.approx(sliced[row], abs=32e-4, rel=0)
    whole = losses(found, f"{name} data", "masked")
    np.testing.assert_allclose([masked[row] for row in range(12)], [whole[row] for row in range(12)], atol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", TEACHERS)
def test_gradients_of_masks_are_the_same_under_every_layout_and_on_every_rank(
    name: str, layout: str, found: Found
) -> None:
    for rank in found:
        gradients = rank["masks"][f"{name} {layout}"]["gradients"]
        expected = found[0]["masks"][f"{name} data"]["gradients"]
        for kind in KINDS:
            assert expected[kind].abs().max() > 1e-3
            assert torch.equal(gradients[kind], found[0]["masks"][f"{name} {layout}"]["gradients"][kind])
            scale = float(expected[kind].abs().max())
            torch.testing.assert_close(gradients[kind], expected[kind], atol=1e-4 * scale, rtol=0)


@pytest.mark.parametrize("layout", JOB_LAYOUTS)
def test_gradients_of_masks_are_those_of_what_they_scale(layout: str, found: Found) -> None:
    """Where nothing is masked, a mask's gradient is Σ weight · gradient of what it scales, in plain torch."""
    plain, gradients = found[0]["masks"]["plain"], found[0]["masks"][f"grouped {layout}"]["gradients of everything"]
    tokens = float(plain["tokens"])

    def product(name: str) -> Tensor:
        return (plain[name] * plain[f"{name}.grad"]).double() * tokens

    channels = product("embedding.weight").sum(dim=0)
    for layer in range(GROUPED.num_layers):
        out, down = product(f"layers.{layer}.out.weight"), product(f"layers.{layer}.down.weight")
        channels += out.sum(dim=1) + down.sum(dim=1) + product(f"layers.{layer}.shortcut_up.weight").sum(dim=1)
        assert_close(gradients["ffn"][layer], down.sum(dim=0))
        heads = out.sum(dim=0).view(4, GROUPED.channels).sum(dim=1).view(2, 2)
        assert_close(gradients["heads"][2 * layer : 2 * layer + 2], heads)
        assert_close(gradients["groups"][layer], heads.sum(dim=1))
    assert_close(gradients["channels"][0], channels)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("layout", JOB_LAYOUTS)
@pytest.mark.parametrize("name", TEACHERS)
def test_learned_masks_are_the_same_under_every_layout(name: str, layout: str, found: Found) -> None:
    """Losses of all steps, and what stays of the student's size."""
    learned, expected = (found[0]["masks"][f"{name} {each}"]["masks"] for each in (layout, "data"))
    assert len(learned["losses"]) == 3
    np.testing.assert_allclose(learned["losses"], expected["losses"], atol=1e-4)
    assert learned["settings"]["batch_size"] == 5
    part, student = PruningPlan(**learned["part"]), STUDENTS[name]
    assert part == PruningPlan(**expected["part"])
    assert (len(part.channels), {len(each) for each in part.ffn}) == (student.hidden_size, {student.ffn_size})
    assert {len(each) for each in part.groups} == {student.num_groups}
    assert {len(each) for each in part.heads} == {student.num_attention_heads}


@pytest.mark.parametrize("method", ["weights", "values", "masks"])
def test_what_does_nothing_goes_by_every_method(method: str, found: Found) -> None:
    """Half of the channels, neurons and groups are zeros: of what is left, which has been trained, half stays."""
    half_dead = found[0]["masks"]["half dead"]
    parts = [PruningPlan(**half_dead["masks"]["part"])] if method == "masks" else half_dead[f"by {method}"]
    for part in parts:
        assert min(part.channels) >= QUARTER.hidden_size * 2
        assert all(min(each) >= QUARTER.ffn_size * 2 for each in part.ffn)
        assert all(min(each) >= 2 for each in part.groups)
    if method == "masks":
        losses = half_dead["masks"]["losses"]
        assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.5
