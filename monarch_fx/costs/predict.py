"""Predicted seconds of products on a device, and from how many tokens a Monarch product is the faster one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import sympy
from numpy.typing import NDArray

from monarch_fx.costs import formulas
from monarch_fx.costs.profile import DTYPE_BYTES, DeviceProfile
from monarch_fx.costs.symbols import DEVICE, SIZES
from monarch_fx.kernels import choice
from monarch_fx.structure import MonarchShape

Tokens = int | NDArray[np.int64]
Seconds = float | NDArray[np.float64]

MOST_TOKENS = 2**16  # beyond it the launches don't count any more, and no verdict changes


@dataclass(frozen=True)
class Surroundings:
    """What stands around a product in its model.

    Attributes:
        bias: A bias is added to the result.
        activated: An activation that this library's kernels know is computed from the result, and nothing else.
        together: Products that read the same activations, this one among them.
    """

    bias: bool = False
    activated: bool = False
    together: int = 1


ALONE = Surroundings()


def dense_seconds(
    profile: DeviceProfile,
    tokens: Tokens,
    in_features: int,
    out_features: int,
    *,
    batch: int = 1,
    dtype: str = "float32",
    workload: str = "inference",
    around: Surroundings = ALONE,
) -> Seconds:
    """Predicted seconds of one dense product, and of the activation behind it where a Monarch product computes it, too.

    Args:
        profile: The device.
        tokens: Rows that each matrix is multiplied with; an array gives an array.
        in_features: Columns of the matrix.
        out_features: Its rows.
        batch: Equal matrices in the product.
        dtype: Of operands and result, without ``torch.``.
        workload: ``"inference"`` (forward) or ``"training"`` (forward and backward).
        around: What stands around the product.

    Raises:
        DeviceProfileError: The profile doesn't know ``dtype``.
    """
    constants = _constants(profile, dtype)
    sizes = (tokens, in_features, out_features, 1, 1, 1, batch, DTYPE_BYTES[dtype])
    seconds = _function("dense", workload)(*sizes, *constants)
    if _fuses(profile, dtype, batch, workload, around):
        seconds = seconds + _function("activation")(*sizes, *constants)
    return seconds


def monarch_seconds(
    profile: DeviceProfile,
    tokens: Tokens,
    shape: MonarchShape,
    *,
    batch: int = 1,
    dtype: str = "float32",
    workload: str = "inference",
    around: Surroundings = ALONE,
) -> Seconds:
    """Predicted seconds of one Monarch product, as the operator runs it; arguments as for ``dense_seconds``.

    Raises:
        DeviceProfileError: The profile doesn't know ``dtype``.
    """
    constants = _constants(profile, dtype)
    rows, n_out, n_in = np.asarray(tokens), shape.nblocks_out, shape.nblocks_in
    sizes = (tokens, shape.in_features, shape.out_features, n_out, n_in, shape.rank, batch, DTYPE_BYTES[dtype])
    if not _has_kernels(profile, dtype, batch):
        return _function("monarch", workload)(*sizes, *constants)

    def seconds(structure: str, *lowering: str | int, transposed: bool = False) -> Seconds:
        swapped = (tokens, shape.out_features, shape.in_features, n_in, n_out, *sizes[5:])
        return _function(structure, *lowering)(*(swapped if transposed else sizes), *constants)

    def halves(second: str, *, transposed: bool = False) -> Seconds:
        """The lowering of many tokens, and that of few ones."""
        blocks, p = (n_out, shape.s) if transposed else (n_in, shape.p)
        few = seconds("without_copies", "own", "own", transposed=transposed)
        many = seconds("without_copies", "joined" if blocks == 1 else "own", second, transposed=transposed)
        if blocks > 1 and p % 64:
            strided = seconds("without_copies", "strided", second, transposed=transposed)
            many = np.where(2 * rows * n_in * n_out * shape.rank * p >= choice.STRIDED_FLOPS, strided, many)
        return np.where(rows <= choice.FEW_TOKENS, few, many)

    training = workload == "training"
    activated = _fuses(profile, dtype, batch, workload, around)
    forward = halves("own" if activated or (around.bias and n_out > 1) else "library")
    if training:
        return forward + halves("library", transposed=True) + seconds("factor_gradients")
    has_fused = profile.fused_efficiency > 0
    if has_fused and choice.is_fused(choice.FUSED_TOKENS, n_in, n_out, shape.rank, shape.p, shape.s):
        held = max(16, 1 << (shape.rank - 1).bit_length())
        forward = np.where(rows >= choice.FUSED_TOKENS, seconds("fused", held), forward)
    shared = 1 - 1 / min(around.together, choice.TOGETHER)  # of both launches
    forward = forward - np.where(rows <= choice.FEW_TOKENS, 2 * shared * profile.kernel_launch_s, 0.0)
    return forward + seconds("epilogue") if activated else forward


def _has_kernels(profile: DeviceProfile, dtype: str, batch: int) -> bool:
    """Whether this library's kernels run the product."""
    return batch == 1 and profile.kernel_efficiency > 0 and DTYPE_BYTES[dtype] == 2


def _fuses(profile: DeviceProfile, dtype: str, batch: int, workload: str, around: Surroundings) -> bool:
    """Whether they compute the activation, too: gradients need what is in front of it."""
    return around.activated and workload == "inference" and _has_kernels(profile, dtype, batch)


@functools.lru_cache(maxsize=4096)
def break_even_tokens(
    profile: DeviceProfile,
    shape: MonarchShape,
    *,
    batch: int = 1,
    dtype: str = "float32",
    workload: str = "inference",
    around: Surroundings = ALONE,
) -> int | None:
    """The smallest number of tokens from which on the Monarch product is always predicted faster than the dense one.

    Returns:
        Rows per matrix, at most ``MOST_TOKENS``; None where Monarch doesn't stay faster.

    Raises:
        DeviceProfileError: The profile doesn't know ``dtype``.
    """
    tokens = np.arange(1, MOST_TOKENS + 1)
    size = shape.in_features, shape.out_features
    dense = dense_seconds(profile, tokens, *size, batch=batch, dtype=dtype, workload=workload, around=around)
    monarch = monarch_seconds(profile, tokens, shape, batch=batch, dtype=dtype, workload=workload, around=around)
    (slower,) = np.nonzero(np.asarray(dense) <= np.asarray(monarch))
    first = 1 if len(slower) == 0 else int(tokens[slower[-1]]) + 1
    return first if first <= MOST_TOKENS else None


def _constants(profile: DeviceProfile, dtype: str) -> tuple[float, ...]:
    """Values of ``symbols.DEVICE``, in its order."""
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
        profile.peak_flops.get("float32", profile.peak(dtype)),
    )


@functools.cache
def _function(structure: str, *lowering: str | int) -> Callable[..., Seconds]:
    """The seconds of a structure as a NumPy function of ``formulas.SIZES`` and ``symbols.DEVICE``."""
    kernels = getattr(formulas, structure)(*lowering)
    return sympy.lambdify([*SIZES, *DEVICE], formulas.seconds(kernels), modules="numpy", cse=True)
