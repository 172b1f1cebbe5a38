"""The simulated scanner of the MRI example, and its baselines."""

import pytest
import torch
from torch import Tensor

from examples.mri import MonarchSense, cg_sense, combine, masks, measure, sensitivities, spectrum


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 16, 16)


@pytest.fixture
def coils() -> Tensor:
    return sensitivities(4, 16)


@pytest.mark.parametrize("acceleration", [2, 4])
def test_masks_measure_their_share_and_the_middle(acceleration: int) -> None:
    found = masks(3, 64, acceleration, seed=0)
    assert found.sum((1, 2)).tolist() == [64 * 64 / acceleration] * 3
    assert (found[:, :2, :2] == 1).all()
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found, masks(3, 64, acceleration, seed=0))


def test_sensitivities_sum_to_one(coils: Tensor) -> None:
    torch.testing.assert_close(coils.abs().square().sum(0), torch.ones(16, 16))


def test_monarch_sense_starts_as_sense(images: Tensor, coils: Tensor) -> None:
    mask = masks(2, 16, 2, seed=0)
    measured = measure(images, coils, mask, seed=0)
    sense = combine(measured, coils)
    torch.testing.assert_close(MonarchSense(coils)(measured, mask), sense, rtol=0, atol=1e-5)
    again = sense + combine(measured - mask.unsqueeze(1) * spectrum(sense, coils), coils)
    torch.testing.assert_close(MonarchSense(coils, rounds=2)(measured, mask), again, rtol=0, atol=1e-5)


def test_everything_measured_gives_the_image_but_for_noise(images: Tensor, coils: Tensor) -> None:
    whole = torch.ones(1, 16, 16)
    measured = measure(images, coils, whole, seed=0)
    noise = combine(measured, coils) - images
    # Unit-norm transforms and coils keep the deviation of the noise, 0.01 sqrt(2); that of 512 values is known to 3 %.
    assert float(noise.abs().square().mean().sqrt()) == pytest.approx(0.01 * 2**0.5, rel=0.15)


def test_conjugate_gradients_solve_the_normal_equations(images: Tensor, coils: Tensor) -> None:
    mask, damping = masks(1, 16, 2, seed=0), 0.1
    measured = measure(images, coils, mask, seed=0)
    x = cg_sense(measured, coils, mask, 60, damping)
    again = combine(mask * spectrum(x, coils), coils)
    torch.testing.assert_close(again + damping * x, combine(measured, coils), rtol=0, atol=1e-4)
