"""Discrete cosine and sine transforms, types II to IV."""

from __future__ import annotations

import math

import torch

from monarch_fx.errors import ConfigError
from monarch_fx.structure import Monarch
from monarch_fx.transforms.algebra import cast, real_part, reordered, scaled
from monarch_fx.transforms.fourier import check_norm, fourier, scale_of
from monarch_fx.transforms.sizes import FLOATS, checked_dtype, split


def dct(
    n: int,
    type: int = 2,
    norm: str = "backward",
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Monarch:
    """``scipy.fft.dct`` of composite size: one real Monarch matrix of rank 2 with a permutation on both sides.

    It is the real part of twiddles times a DFT of the same size, whose inputs are first the even ones in order and then
    the odd ones in reverse (Makhoul 1980). For n = k1 k2 it has 2 n (k1 + k2) real parameters, 4 n (k1 + k2) FLOPs.

    Args:
        n: Size; composite. The grid is the most square one.
        type: 2, 3 or 4.
        norm: As in ``scipy.fft``: type 3 with ``"forward"`` is the inverse of type 2.
        dtype: Floating-point; default: PyTorch's. Factors are computed in float64.
        device: Of the factors.

    Raises:
        StructureError: ``n`` has no two factors above 1.
        ConfigError: Another type, norm or dtype.
    """
    return cast(_cosine(n, type, norm, "dct"), checked_dtype(dtype, FLOATS, "dct"), device)


def dst(
    n: int,
    type: int = 2,
    norm: str = "backward",
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Monarch:
    """``scipy.fft.dst`` of composite size: one real Monarch matrix of rank 2; see ``dct``.

    It is the ``dct`` with outputs in reverse and every second input negated, type 3 with inputs in reverse and every
    second output negated. Arguments and errors are those of ``dct``.
    """
    cosine = _cosine(n, type, norm, "dst")
    signs = 1.0 - 2 * (torch.arange(n, dtype=torch.float64) % 2)
    reverse = torch.arange(n).flip(0)
    if type == 3:
        sine = scaled(reordered(cosine, columns=reverse), rows=signs)
    else:
        sine = scaled(reordered(cosine, rows=reverse), columns=signs)
    return cast(sine, checked_dtype(dtype, FLOATS, "dst"), device)


def _cosine(n: int, kind: int, norm: str, name: str) -> Monarch:
    if kind not in (2, 3, 4):
        raise ConfigError(f"type of {name} must be 2, 3 or 4, got {kind!r}.")
    check_norm(norm)
    grid = split(n, name)
    scale = 2 * scale_of(2 * n, norm)
    m, turn = torch.arange(n), torch.arange(n).double() / n
    source = torch.where(m < (n + 1) // 2, 2 * m, 2 * (n - 1 - m) + 1)  # which input stands at place m
    fft = fourier(grid, -1, scale, torch.complex128, None)
    if kind == 4:
        halves = 1.0 - 2 * (m >= (n + 1) // 2).double()
        fft = scaled(fft, rows=_turned(turn / 4 + 1 / (8 * n)), columns=halves * _turned(turn / 2))
        return reordered(real_part(fft), columns=source.argsort())
    two = reordered(real_part(scaled(fft, rows=_turned(turn / 4))), columns=source.argsort())
    first = torch.ones(n, dtype=torch.float64)
    if kind == 2:
        first[0] = math.sqrt(0.5) if norm == "ortho" else 1.0
        return scaled(two, rows=first)
    first[0] = math.sqrt(0.5) if norm == "ortho" else 0.5
    return scaled(two.transpose(), columns=first)


def _turned(turns: torch.Tensor) -> torch.Tensor:
    """``exp(-2 pi i turns)``."""
    return torch.polar(torch.ones_like(turns), -2 * math.pi * turns)
