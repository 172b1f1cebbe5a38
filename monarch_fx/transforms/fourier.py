"""Discrete Fourier transforms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from monarch_fx.errors import ConfigError
from monarch_fx.structure import Monarch
from monarch_fx.transforms.composition import Kronecker
from monarch_fx.transforms.sizes import COMPLEX, checked_dtype, split

NORMS = ("backward", "ortho", "forward")


def dft(
    n: int, norm: str = "backward", *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Monarch:
    """``torch.fft.fft`` of composite size: one complex Monarch matrix with a stride permutation on both sides.

    The first step of Cooley and Tukey for n = k1 k2: DFTs of size k2 with twiddles in R, DFTs of size k1 in L (Dao et
    al. 2022, section 3.2). n (k1 + k2) complex parameters, 8 n (k1 + k2) FLOPs.

    Args:
        n: Size; composite. The grid is the most square one.
        norm: As in ``torch.fft``.
        dtype: complex64 or complex128; default: what belongs to PyTorch's default dtype.
        device: Of the factors.

    Raises:
        StructureError: ``n`` has no two factors above 1.
        ConfigError: Another norm or dtype.
    """
    check_norm(norm)
    return fourier(split(n, "dft"), -1, scale_of(n, norm), checked_dtype(dtype, COMPLEX, "dft"), device)


def idft(
    n: int, norm: str = "backward", *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Monarch:
    """``torch.fft.ifft`` of composite size; see ``dft``."""
    check_norm(norm)
    scale = scale_of(n, NORMS[2 - NORMS.index(norm)])
    return fourier(split(n, "idft"), 1, scale, checked_dtype(dtype, COMPLEX, "idft"), device)


def dft2(
    height: int,
    width: int,
    norm: str = "backward",
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Kronecker:
    """``torch.fft.fft2`` of a flattened image (..., height * width): the Kronecker product of two ``dft``.

    All rows share one matrix, and all columns one: for h = h1 h2 and w = w1 w2 it has h (h1 + h2) + w (w1 + w2) complex
    parameters and 8 h w (h1 + h2 + w1 + w2) FLOPs. A single Monarch matrix, also for prime sizes, is
    ``kronecker(torch.fft.fft(torch.eye(h)), torch.fft.fft(torch.eye(w)))``.

    Raises:
        StructureError, ConfigError: As ``dft``.
    """
    return Kronecker(*(dft(n, norm, dtype=dtype, device=device) for n in (height, width)))


def idft2(
    height: int,
    width: int,
    norm: str = "backward",
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Kronecker:
    """``torch.fft.ifft2`` of a flattened image (..., height * width); see ``dft2``."""
    return Kronecker(*(idft(n, norm, dtype=dtype, device=device) for n in (height, width)))


def fourier(
    grid: tuple[int, int],
    sign: int,
    scale: float,
    dtype: torch.dtype,
    device: torch.device | str | None,
    inputs: int | None = None,
    outputs: int | None = None,
) -> Monarch:
    """``scale * exp(sign 2 pi i row column / n)`` for n = k1 k2, or its first ``outputs`` rows and ``inputs`` columns.

    With column = i k1 + k and row = l k2 + j, row * column = i l n + j (i k1 + k) + l k k2, and the first term is a
    whole number of turns.
    """
    k1, k2 = grid
    n = k1 * k2
    inputs, outputs = inputs or n, outputs or n
    k, j = torch.arange(k1).view(-1, 1, 1), torch.arange(k2).view(-1, 1)
    i, l = torch.arange(-(-inputs // k1)), torch.arange(-(-outputs // k2))  # noqa: E741
    column, row = i * k1 + k, l * k2 + j.unsqueeze(-1)
    R = _turns(j * column % n, n, sign, dtype)  # (k1, k2, p)
    L = _turns(l * k % k1, k1, sign, dtype)  # (k1, 1, s)
    L = (scale * L).expand(k1, k2, -1).transpose(0, 1)
    column, row = column.flatten(), row.flatten()
    return Monarch(
        R.unsqueeze(2).to(device),
        L.unsqueeze(2).contiguous().to(device),
        inputs,
        outputs,
        input_permutation=column.argsort()[:inputs].to(device),
        output_permutation=row.argsort()[:outputs].to(device),
    )


def _turns(count: Tensor, n: int, sign: int, dtype: torch.dtype) -> Tensor:
    """``exp(sign 2 pi i count / n)`` for counts below n, computed in float64."""
    angle = sign * 2 * math.pi / n * count.double()
    return torch.polar(torch.ones_like(angle), angle).to(dtype)


def scale_of(n: int, norm: str) -> float:
    return {"backward": 1.0, "ortho": n**-0.5, "forward": 1 / n}[norm]


def check_norm(norm: str) -> None:
    if norm not in NORMS:
        raise ConfigError(f"norm must be one of {', '.join(map(repr, NORMS))}, got {norm!r}.")
