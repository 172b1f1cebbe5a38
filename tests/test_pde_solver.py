"""The examples' solver against exact solutions, its order, and the start of the neural operators."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from examples.pde import SMALL, NeuralOperator, Problem
from examples.solver import burgers, navier_stokes, random_fields


def places(n: int) -> Tensor:
    return torch.arange(n, dtype=torch.float64) / n


def test_burgers_against_the_transform_of_cole_and_hopf() -> None:
    """u = -2 nu phi_x / phi with the heat equation's phi = 2 + exp(-4 pi^2 nu t) cos(2 pi x)."""
    nu, time, x = 0.05, 0.4, places(64)

    def exact(t: float) -> Tensor:
        decay = math.exp(-4 * math.pi**2 * nu * t)
        return 4 * math.pi * nu * decay * torch.sin(2 * math.pi * x) / (2 + decay * torch.cos(2 * math.pi * x))

    # 64 points resolve this to 1e-11; the scheme's error is of order dt^4.
    torch.testing.assert_close(burgers(exact(0), nu, time, 200), exact(time), rtol=0, atol=1e-8)


def test_vortices_without_advection_decay() -> None:
    """Those of Taylor and Green."""
    nu, x = 0.01, 2 * math.pi * places(16)
    w = torch.cos(x).unsqueeze(-1) * torch.cos(x)
    decay = math.exp(-8 * math.pi**2 * nu)
    torch.testing.assert_close(navier_stokes(w, nu, 1.0, 10), decay * w, rtol=0, atol=1e-14)


def test_force_is_balanced_by_viscosity() -> None:
    nu, y = 0.05, 2 * math.pi * places(16)
    force = torch.sin(y).expand(16, 16)
    steady = force / (4 * math.pi**2 * nu)
    found = navier_stokes(torch.zeros(16, 16, dtype=torch.float64), nu, 20.0, 2000, force)
    torch.testing.assert_close(found, steady, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("shape", "solve"),
    [((64,), lambda u, steps: burgers(u, 0.02, 0.5, steps)), ((32, 32), lambda w, n: navier_stokes(w, 1e-3, 4.0, n))],
    ids=["burgers", "navier-stokes"],
)
def test_fourth_order(shape: tuple[int, ...], solve: Callable[[Tensor, int], Tensor]) -> None:
    scale, tau, alpha = (25.0, 5.0, 2.0) if len(shape) == 1 else (7**1.5, 7.0, 2.5)
    start = random_fields(2, shape, scale, tau, alpha, seed=0).double()
    exact = solve(start, 640)
    errors = [float((solve(start, steps) - exact).norm()) for steps in (40, 80)]
    assert 12 < errors[0] / errors[1] < 20  # halving the step divides the error by 2^4


def test_fields_have_the_spectrum_asked_for() -> None:
    fields = random_fields(20000, (16,), scale=3.0, tau=4.0, alpha=1.5, seed=0)
    k = 2 * math.pi * torch.fft.fftfreq(16, 1 / 16)
    energy = torch.fft.fft(fields).abs().square().mean(0) / 16**2
    # Means of 20,000 squares, of one or two normal numbers, are known to 1 %; 5 deviations.
    torch.testing.assert_close(energy, 9 * (k.square() + 16) ** -1.5, rtol=0.05, atol=0)


@pytest.mark.parametrize("problem", SMALL, ids=lambda problem: problem.name)
def test_both_operators_start_with_the_same_outputs(problem: Problem) -> None:
    x = torch.randn(2, problem.seen, *problem.shape)
    outputs = []
    for learned in (False, True):
        torch.manual_seed(0)
        outputs.append(NeuralOperator(problem, learned)(x))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-4 * float(outputs[0].abs().max().detach()))  # float32
