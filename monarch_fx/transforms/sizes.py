"""Grids of transforms, and what is refused."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from monarch_fx.errors import ConfigError, StructureError, WeightError

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)


def split(n: int, name: str) -> tuple[int, int]:
    """The factors (k1, k2) of ``n = k1 * k2`` that are nearest to each other, k1 <= k2: fewest parameters.

    Raises:
        StructureError: ``n`` is not composite.
    """
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise StructureError(f"The size of {name} must be a positive integer, got {n!r}.")
    k1 = next((k for k in range(math.isqrt(n), 1, -1) if n % k == 0), None)
    if k1 is None:
        raise StructureError(
            f"{name} of size {n} has no Monarch form smaller than dense: {n} has no two factors above 1, no grid. "
            f"Pad to a composite size, {max(4, n + n % 2)} for example, or take torch.fft; circulant and toeplitz, "
            "which may have any size, do convolutions."
        )
    return k1, n // k1


def split_power(n: int, name: str) -> tuple[int, int]:
    """As ``split``, for transforms that only exist at powers of two.

    Raises:
        StructureError: ``n`` is not a power of two from 4 on.
    """
    if not isinstance(n, int) or isinstance(n, bool) or n < 4 or n & (n - 1):
        raise StructureError(f"The size of {name} must be a power of two from 4 on, got {n!r}.")
    return split(n, name)


def checked_dtype(dtype: torch.dtype | None, choices: tuple[torch.dtype, ...], name: str) -> torch.dtype:
    """``dtype``, or the default of PyTorch, complex where ``choices`` are.

    Raises:
        ConfigError: It is none of ``choices``.
    """
    if dtype is None:
        default = torch.get_default_dtype()
        return default.to_complex() if choices is COMPLEX else default
    if dtype not in choices:
        raise ConfigError(f"{name} has values in {', '.join(map(str, choices))}, got dtype={dtype}.")
    return dtype


def checked_vectors(name: str, dtypes: tuple[torch.dtype, ...], **vectors: Tensor) -> None:
    """Raises unless all are vectors of one dtype out of ``dtypes``.

    Raises:
        StructureError: One is not a vector, or is empty.
        WeightError: Their dtypes can't be used together.
    """
    for key, value in vectors.items():
        if value.ndim != 1 or not len(value):
            raise StructureError(f"{key} of {name} must be a vector, got shape {tuple(value.shape)}.")
    if len(found := {value.dtype for value in vectors.values()}) > 1 or not found <= set(dtypes):
        raise WeightError(
            f"{', '.join(vectors)} of {name} must have one dtype out of {', '.join(map(str, dtypes))}, got "
            f"{', '.join(sorted(map(str, found)))}."
        )
