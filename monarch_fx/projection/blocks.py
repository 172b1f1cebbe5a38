"""A dense weight cut into the blocks of a grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from monarch_fx.errors import MetaDeviceError, StructureError, WeightError


def check_weight(weight: Tensor) -> None:
    """Raises unless ``weight`` holds finite floating-point (or complex) values shaped (out, in) or (B, out, in).

    Raises:
        MetaDeviceError: It has no values.
        StructureError: It has another number of dimensions.
        WeightError: Its dtype or its values can't be projected.
    """
    if weight.is_meta:
        raise MetaDeviceError("The weight is on the meta device and has no values to project: materialise it first.")
    if weight.ndim not in (2, 3):
        raise StructureError(f"A weight must be (out, in) or (batch, out, in), got shape {tuple(weight.shape)}.")
    if not (weight.is_floating_point() or weight.is_complex()):
        raise WeightError(f"A weight of dtype {weight.dtype} can't be projected: convert it to a floating-point dtype.")
    if not torch.isfinite(weight).all():
        raise WeightError(f"The weight of shape {tuple(weight.shape)} holds NaN or infinite values.")


def cut(matrix: Tensor, grid: tuple[int, int]) -> Tensor:
    """The blocks (nblocks_out, nblocks_in, s, p) of a matrix (out, in), padded with zeros to equal sizes."""
    (n_out, n_in), (rows, columns) = grid, matrix.shape
    padded = F.pad(matrix, (0, -columns % n_in, 0, -rows % n_out))
    return padded.unflatten(1, (n_in, -1)).unflatten(0, (n_out, -1)).transpose(1, 2)


def small_gram(blocks: Tensor) -> Tensor:
    """``B^H B`` (..., p, p) or ``B B^H`` (..., s, s) of every block (..., s, p), whichever is smaller."""
    s, p = blocks.shape[-2:]
    return blocks.mH @ blocks if p <= s else blocks @ blocks.mH
