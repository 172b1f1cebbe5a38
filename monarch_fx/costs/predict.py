"""Predicted seconds of products on a device, and at how many tokens a Monarch product is the faster one."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import sympy
from numpy.typing import NDArray

from monarch_fx.costs import formulas
from monarch_fx.costs.halves import Halves, Seconds, is_aligned
from monarch_fx.costs.kernel import TF32_GRADIENTS, TF32_KERNELS
from monarch_fx.costs.profile import DTYPE_BYTES, DeviceProfile
from monarch_fx.costs.symbols import DEVICE, SIZES
from monarch_fx.kernels import choice
from monarch_fx.kernels.padding import ROW
from monarch_fx.structure import MonarchShape

Tokens = int | NDArray[np.int64]

MOST_TOKENS = 2**16  # beyond it the launches don't count any more, and no verdict changes


@dataclass(frozen=True)
class Surroundings:
    """What stands around a product in its model.

    Attributes:
        bias: A bias is added to the result.
        activated: An activation that this library's kernels know is computed from the result, and nothing else.
        beside: ``out_features`` of the other products that read the same activations.
        recomputed: In training, the backward pass computes the intermediate anew.
    """

    bias: bool = False
    activated: bool = False
    beside: tuple[int, ...] = ()
    recomputed: bool = False

    @property
    def joined(self) -> tuple[int, ...]:
        """``out_features`` of those that share its launches where tokens are few."""
        return self.beside[: choice.TOGETHER - 1]


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

    In half precision on a GPU sizes that are no multiples of 8 are padded where that is faster, as Inductor does.

    Args:
        profile: The device.
        tokens: Rows that each matrix is multiplied with; an array gives an array.
        in_features: Columns of the matrix.
        out_features: Its rows.
        batch: Equal matrices in the product.
        dtype: Of operands and result, without ``torch.``; "tf32": see ``DeviceProfile``.
        workload: ``"inference"`` (forward) or ``"training"`` (forward and backward).
        around: What stands around the product.

    Raises:
        DeviceProfileError: The profile doesn't know ``dtype``.
    """
    constants = _constants(profile, dtype)
    sizes = (tokens, in_features, out_features, 1, 1, 1, batch, DTYPE_BYTES[dtype], 1, 1)
    on_gpu = has_kernels(profile, dtype, batch)
    seconds = _function("dense_on_gpu" if on_gpu else "dense", workload)(*sizes, *constants)
    if on_gpu and not is_aligned(ROW, in_features, out_features):
        unaligned, padded = (
            _function(*lowering)(*sizes, *constants)
            for lowering in (("dense_on_gpu", workload, False), ("dense_padded", workload))
        )
        seconds = np.where(np.asarray(tokens) > choice.FEW_TOKENS, np.minimum(unaligned, padded), seconds)
    if on_gpu and dtype == "tf32" and workload == "training":
        forward = dense_seconds(profile, tokens, in_features, out_features, dtype=dtype)
        seconds = forward + (seconds - forward) / TF32_GRADIENTS
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
    rows = np.asarray(tokens)
    beside = () if dtype == "tf32" or workload == "training" else around.joined
    together = np.where(rows <= choice.FEW_TOKENS, 1 + len(beside), 1)

    def seconds(of: MonarchShape, structure: str, *lowering: str | int, splits: Tokens = 1) -> Seconds:
        sizes = (tokens, of.in_features, of.out_features, of.nblocks_out, of.nblocks_in, of.rank)
        return _function(structure, *lowering)(*sizes, batch, DTYPE_BYTES[dtype], splits, together, *constants)

    recomputed = workload == "training" and around.recomputed
    if not has_kernels(profile, dtype, batch):
        again = seconds(shape, "first_half_anew") if recomputed and batch == 1 else 0.0
        return seconds(shape, "monarch", workload) + again
    activated = _fuses(profile, dtype, batch, workload, around)
    on_hopper = profile.fused_efficiency > 0
    halves = Halves(seconds, rows, profile.units, dtype == "tf32", on_hopper=on_hopper, alone=not beside)
    forward = halves.forward(shape, around.bias, activated)
    n_out, n_in, rank = shape.nblocks_out, shape.nblocks_in, shape.rank
    least = choice.fused_tokens(n_in, n_out, rank, shape.p, shape.s, profile.units)
    if on_hopper and dtype != "tf32" and math.isfinite(least):
        held = max(choice.FUSED_WHOLE, sum(choice.fused_ranks(rank)))  # fewer take as long
        whole = shape.p % (2 * ROW) == shape.s % (2 * ROW) == 0
        small, large = (seconds(shape, "fused", held, count * choice.FUSED_TOKENS, whole) for count in (1, 2))
        fused = np.where(rows >= choice.fused_large_tokens(n_in, n_out, held, profile.units), large, small)
        forward = np.where(rows >= least, fused, forward)
    if dtype != "tf32" and workload == "inference" and is_aligned(ROW, shape.p, shape.s):
        count = 1 + len(beside)  # of the same grid and rank
        of_blocks = [shape.s, *(-(-features // n_out) for features in beside)]
        depth, blocks, units = n_in * rank, (of_blocks, [n_out] * count), profile.units
        tiles = choice.held_tiles(shape.p, depth, *blocks, units, DTYPE_BYTES[dtype])
        if tiles is not None:
            forward = np.where(rows == 1, seconds(shape, "held", *(tile.N for tile in tiles)), forward)
        if choice.ahead_tiles(shape.p, [n_out * rank] * count, [n_in] * count, depth, *blocks, units) is not None:
            are_few = (rows > 1) & (rows <= choice.AHEAD_TOKENS)
            forward = np.where(are_few, seconds(shape, "ahead"), forward)
    if workload == "training":
        kept = halves.training(shape, around.bias, recomputed=recomputed)
        # the forward pass is that of inference, and the first half runs a second time
        return kept - halves.forward(shape, around.bias) + forward + halves.first(shape) if recomputed else kept
    return forward + seconds(shape, "epilogue") if activated else forward


def has_kernels(profile: DeviceProfile, dtype: str, batch: int) -> bool:
    """Whether this library's kernels run the product."""
    return batch == 1 and profile.kernel_efficiency > 0 and dtype in ("bfloat16", "float16", "tf32")


def _fuses(profile: DeviceProfile, dtype: str, batch: int, workload: str, around: Surroundings) -> bool:
    """Whether they compute the activation, too: gradients need what is in front of it."""
    return around.activated and workload == "inference" and dtype != "tf32" and has_kernels(profile, dtype, batch)


@functools.lru_cache(maxsize=4096)
def paying_tokens(
    profile: DeviceProfile,
    shape: MonarchShape,
    *,
    batch: int = 1,
    dtype: str = "float32",
    workload: str = "inference",
    around: Surroundings = ALONE,
    correction: float = 1.0,
) -> tuple[tuple[int, int | None], ...]:
    """At how many tokens, up to ``MOST_TOKENS``, the Monarch product is predicted faster than the dense one.

    ``correction``: what its time over that of the dense one is of the predicted ratio.

    Returns:
        Ranges of rows per matrix, first and last; a last of None: without end. Empty where it never pays.

    Raises:
        DeviceProfileError: The profile doesn't know ``dtype``.
    """
    tokens = np.arange(1, MOST_TOKENS + 1)
    size = shape.in_features, shape.out_features
    dense = dense_seconds(profile, tokens, *size, batch=batch, dtype=dtype, workload=workload, around=around)
    monarch = monarch_seconds(profile, tokens, shape, batch=batch, dtype=dtype, workload=workload, around=around)
    pays = np.concatenate([[False], correction * np.asarray(monarch) < np.asarray(dense), [False]])
    edges = np.flatnonzero(pays[1:] != pays[:-1]).tolist()  # before the first and after the last of each range
    return tuple(
        (before + 1, None if last == MOST_TOKENS else last)
        for before, last in zip(edges[::2], edges[1::2], strict=True)
    )


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
        profile.kernel_efficiency * (TF32_KERNELS if dtype == "tf32" else 1),
        profile.kernel_launch_s,
        profile.kernel_overlap,
        profile.kernel_operand_bytes_per_s,
        profile.fused_efficiency,
        profile.peak_flops.get("float32", profile.peak(dtype)),
        profile.cache_bytes,
    )


@functools.cache
def _function(structure: str, *lowering: str | int) -> Callable[..., Seconds]:
    """The seconds of a structure as a NumPy function of ``formulas.SIZES`` and ``symbols.DEVICE``."""
    kernels = getattr(formulas, structure)(*lowering)
    return sympy.lambdify([*SIZES, *DEVICE], formulas.seconds(kernels), modules="numpy", cse=True)
