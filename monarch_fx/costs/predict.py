"""Predicted seconds of products on a device, and from how many tokens a Monarch product is the faster one."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import sympy
from numpy.typing import NDArray

from monarch_fx.costs import formulas
from monarch_fx.costs.formulas import DEVICE, SIZES
from monarch_fx.costs.profile import DTYPE_BYTES, DeviceProfile
from monarch_fx.kernels.gpu import CUBLAS_FLOPS, FEW_TOKENS
from monarch_fx.structure import MonarchShape

Tokens = int | NDArray[np.int64]
Seconds = float | NDArray[np.float64]

MOST_TOKENS = 2**16  # beyond it the launches don't count any more, and no verdict changes


def dense_seconds(
    profile: DeviceProfile,
    tokens: Tokens,
    in_features: int,
    out_features: int,
    *,
    batch: int = 1,
    dtype: str = "float32",
    workload: str = "inference",
) -> Seconds:
    """Predicted seconds of one dense product.

    Args:
        profile: The device.
        tokens: Rows that each matrix is multiplied with; an array gives an array.
        in_features: Columns of the matrix.
        out_features: Its rows.
        batch: Equal matrices in the product.
        dtype: Of operands and result, without ``torch.``.
        workload: ``"inference"`` (forward) or ``"training"`` (forward and backward).

    Raises:
        DeviceProfileError: The profile doesn't know ``dtype``.
    """
    constants = _constants(profile, dtype)
    sizes = (tokens, in_features, out_features, 1, 1, 1, batch, DTYPE_BYTES[dtype])
    return _function("dense", workload)(*sizes, *constants)


def monarch_seconds(
    profile: DeviceProfile,
    tokens: Tokens,
    shape: MonarchShape,
    *,
    batch: int = 1,
    dtype: str = "float32",
    workload: str = "inference",
) -> Seconds:
    """Predicted seconds of one Monarch product, as the operator runs it; arguments as for ``dense_seconds``.

    Raises:
        DeviceProfileError: The profile doesn't know ``dtype``.
    """
    constants = _constants(profile, dtype)
    grid = (shape.nblocks_out, shape.nblocks_in, shape.rank)
    sizes = (tokens, shape.in_features, shape.out_features, *grid, batch, DTYPE_BYTES[dtype])
    a_grid = batch == 1 and shape.nblocks_out * shape.nblocks_in > 1
    if not (a_grid and profile.kernel_efficiency > 0 and DTYPE_BYTES[dtype] == 2):
        return _function("monarch", workload)(*sizes, *constants)

    def seconds(first: str, second: str) -> Seconds:
        return _function("without_copies", workload, first, second)(*sizes, *constants)

    def with_first(first: str) -> Seconds:
        return np.where(np.asarray(tokens) <= FEW_TOKENS, seconds(first, "own"), seconds(first, "library"))

    if shape.nblocks_in == 1:
        return with_first("joined")
    in_one_call = 2 * np.asarray(tokens) * shape.nblocks_in * shape.rank * shape.p
    return np.where(in_one_call >= CUBLAS_FLOPS, with_first("strided"), with_first("own"))


@functools.lru_cache(maxsize=4096)
def break_even_tokens(
    profile: DeviceProfile,
    shape: MonarchShape,
    *,
    batch: int = 1,
    dtype: str = "float32",
    workload: str = "inference",
) -> int | None:
    """The smallest number of tokens from which on the Monarch product is always predicted faster than the dense one.

    Returns:
        Rows per matrix, at most ``MOST_TOKENS``; None where Monarch doesn't stay faster.

    Raises:
        DeviceProfileError: The profile doesn't know ``dtype``.
    """
    tokens = np.arange(1, MOST_TOKENS + 1)
    dense = dense_seconds(
        profile, tokens, shape.in_features, shape.out_features, batch=batch, dtype=dtype, workload=workload
    )
    monarch = monarch_seconds(profile, tokens, shape, batch=batch, dtype=dtype, workload=workload)
    (slower,) = np.nonzero(np.asarray(dense) <= np.asarray(monarch))
    first = 1 if len(slower) == 0 else int(tokens[slower[-1]]) + 1
    return first if first <= MOST_TOKENS else None


def _constants(profile: DeviceProfile, dtype: str) -> tuple[float, ...]:
    """Values of ``formulas.DEVICE``, in its order."""
    return (
        profile.peak(dtype),
        profile.bandwidth_bytes_per_s,
        profile.copy_bytes_per_s,
        profile.launch_s,
        profile.overlap,
        profile.tile,
        profile.units,
        profile.fill,
        profile.kernel_efficiency,
    )


@functools.cache
def _function(structure: str, workload: str, *lowering: str) -> Callable[..., Seconds]:
    """The seconds of a structure as a NumPy function of ``formulas.SIZES`` and ``formulas.DEVICE``."""
    kernels = getattr(formulas, structure)(workload, *lowering)
    return sympy.lambdify([*SIZES, *DEVICE], formulas.seconds(kernels), modules="numpy", cse=True)
