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
from monarch_fx.kernels import choice
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
    n_out, n_in, rank = shape.nblocks_out, shape.nblocks_in, shape.rank
    sizes = (tokens, shape.in_features, shape.out_features, n_out, n_in, rank, batch, DTYPE_BYTES[dtype])
    if batch > 1 or profile.kernel_efficiency == 0 or DTYPE_BYTES[dtype] > 2:
        return _function("monarch", workload)(*sizes, *constants)
    rows = np.asarray(tokens)

    def seconds(first: str, second: str) -> Seconds:
        return _function("without_copies", workload, first, second)(*sizes, *constants)

    if n_in == 1:
        many = seconds("joined", "library")
    elif shape.p % 64:
        is_large = 2 * rows * n_in * rank * shape.p >= choice.STRIDED_FLOPS
        many = np.where(is_large, seconds("strided", "library"), seconds("own", "library"))
    else:
        many = seconds("own", "library")
    has_fused = profile.fused_efficiency > 0 and workload == "inference"
    if has_fused and choice.is_fused(choice.FUSED_TOKENS, n_in, n_out, rank, shape.p, shape.s):
        held = max(16, 1 << (rank - 1).bit_length())
        many = np.where(rows >= choice.FUSED_TOKENS, _function("fused", workload, held)(*sizes, *constants), many)
    return np.where(rows <= choice.FEW_TOKENS, seconds("own", "own"), many)


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
        profile.tile,
        profile.units,
        profile.launch_s,
        profile.overlap,
        profile.fill,
        profile.kernel_efficiency,
        profile.kernel_launch_s,
        profile.kernel_overlap,
        profile.kernel_fill,
        profile.fused_efficiency,
    )


@functools.cache
def _function(structure: str, workload: str, *lowering: str | int) -> Callable[..., Seconds]:
    """The seconds of a structure as a NumPy function of ``formulas.SIZES`` and ``formulas.DEVICE``."""
    kernels = getattr(formulas, structure)(workload, *lowering)
    return sympy.lambdify([*SIZES, *DEVICE], formulas.seconds(kernels), modules="numpy", cse=True)
