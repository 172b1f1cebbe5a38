"""A pseudo-spectral solver for Burgers' equation and the two-dimensional Navier-Stokes equations on periodic domains.

The linear part is integrated exactly by a factor, the rest by the Runge-Kutta scheme of fourth order (Lawson 1967);
frequencies above two thirds of the grid's are cut, so that products don't alias.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

TAU = 2 * math.pi


def burgers(u: Tensor, viscosity: float, time: float, steps: int) -> Tensor:
    """u_t = -u u_x + viscosity u_xx on (0, 1); values (..., n) at time 0 -> values at ``time``."""
    n = u.shape[-1]
    k = TAU * torch.fft.rfftfreq(n, 1 / n, dtype=u.dtype, device=u.device)
    kept = k < TAU * n / 3

    def advection(spectrum: Tensor) -> Tensor:
        return -0.5j * k * kept * torch.fft.rfft(torch.fft.irfft(spectrum, n).square())

    spectrum = integrate(torch.fft.rfft(u) * kept, -viscosity * k.square(), advection, time / steps, steps)
    return torch.fft.irfft(spectrum, n)


def navier_stokes(w: Tensor, viscosity: float, time: float, steps: int, force: Tensor | float = 0.0) -> Tensor:
    """w_t = -v . grad w + viscosity laplace w + force on (0, 1)^2, w = curl v; (..., n, n) at time 0 -> at ``time``."""
    n = w.shape[-1]
    kx = TAU * torch.fft.fftfreq(n, 1 / n, dtype=w.dtype, device=w.device).unsqueeze(-1)
    ky = TAU * torch.fft.rfftfreq(n, 1 / n, dtype=w.dtype, device=w.device)
    square = kx.square() + ky.square()
    kept = (kx.abs() < TAU * n / 3) & (ky < TAU * n / 3)
    inverse = torch.where(square > 0, 1 / square, 0.0)  # of minus the Laplacian
    pushed = torch.fft.rfft2(force.expand_as(w)) if isinstance(force, Tensor) else force

    def advection(spectrum: Tensor) -> Tensor:
        stream = spectrum * inverse
        fields = torch.stack([1j * ky * stream, -1j * kx * stream, 1j * kx * spectrum, 1j * ky * spectrum])
        vx, vy, wx, wy = torch.fft.irfft2(fields, (n, n))
        return (pushed - torch.fft.rfft2(vx * wx + vy * wy)) * kept

    spectrum = integrate(torch.fft.rfft2(w) * kept, -viscosity * square, advection, time / steps, steps)
    return torch.fft.irfft2(spectrum, (n, n))


def integrate(y: Tensor, linear: Tensor, rest: Callable[[Tensor], Tensor], dt: float, steps: int) -> Tensor:
    """``steps`` of y' = linear y + rest(y)."""
    half = torch.exp(linear * dt / 2)
    whole = half.square()
    for _ in range(steps):
        a = rest(y)
        b = rest(half * (y + dt / 2 * a))
        c = rest(half * y + dt / 2 * b)
        d = rest(whole * y + dt * half * c)
        y = whole * y + dt / 6 * (whole * a + 2 * half * (b + c) + d)
    return y


def random_fields(count: int, shape: tuple[int, ...], scale: float, tau: float, alpha: float, seed: int) -> Tensor:
    """Periodic Gaussian fields (count, *shape) with covariance ``scale^2 (-laplace + tau^2)^-alpha``."""
    noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))
    square = sum(k.square() for k in torch.meshgrid(*(TAU * torch.fft.fftfreq(n, 1 / n) for n in shape), indexing="ij"))
    spread = scale * (square + tau**2) ** (-alpha / 2) * math.sqrt(math.prod(shape))
    dims = tuple(range(1, len(shape) + 1))
    return torch.fft.ifftn(torch.fft.fftn(noise, dim=dims) * spread, dim=dims).real
