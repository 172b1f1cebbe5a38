"""Dense weight -> the nearest Monarch matrix in Frobenius norm (Dao et al. 2022, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from monarch_fx.errors import StructureError
from monarch_fx.projection.blocks import check_weight, cut, small_gram
from monarch_fx.projection.leading import leading
from monarch_fx.structure import Monarch, MonarchShape

# Eigenvectors of a float64 Gram lose singular values below 1e-8 of the largest: less than float32 itself can hold.
_WIDE = {torch.complex64: torch.complex128, torch.complex128: torch.complex128}
_DOUBLE = (torch.float64, torch.complex128)


@torch.no_grad()
def project(weight: Tensor, shape: MonarchShape) -> Monarch:
    """The Monarch matrix of this shape that is nearest to ``weight`` in Frobenius norm: every block's truncated SVD.

    Singular values are split evenly between L and R. The largest entry of every row of R is positive, which makes the
    factors unique where singular values are distinct.

    Args:
        weight: (out, in), or (B, out, in) for B matrices of the same shape; floating-point or complex.
        shape: Size, grid and rank. Sizes that the grid doesn't divide are padded with zeros.

    Returns:
        Contiguous factors in the weight's dtype, on its device; with a batch dimension where ``weight`` has one.

    Raises:
        StructureError: ``weight`` has another size than ``shape``, or the rank exceeds that of a block.
        WeightError: ``weight`` is not floating-point, or holds NaN or infinity.
        MetaDeviceError: ``weight`` has no values.
    """
    check_weight(weight)
    size = (shape.out_features, shape.in_features)
    if tuple(weight.shape[-2:]) != size:
        raise StructureError(f"The structure {shape} is for a weight of shape {size}, got {tuple(weight.shape)}.")
    side = shape.full_rank
    if shape.rank > side:
        raise StructureError(f"Blocks of {shape.s}x{shape.p} have no rank {shape.rank}: use at most {side}.")
    monarch = Monarch.empty(shape, len(weight) if weight.ndim == 3 else None, weight.dtype, weight.device)
    batched = weight.detach(), monarch.L, monarch.R
    for matrix, L, R in zip(*(t if weight.ndim == 3 else t[None] for t in batched), strict=True):
        # one by one: wide copies of all experts would not fit
        left, right = _factor(cut(matrix, shape.grid), shape.rank)
        L.copy_(left)
        R.copy_(right.transpose(0, 1))
    return monarch


def _factor(blocks: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best L (..., rank, s) and R (..., rank, p) with ``L^T R`` close to ``blocks`` (..., s, p)."""
    wide = blocks.to(_WIDE.get(blocks.dtype, torch.float64))
    if blocks.dtype in _DOUBLE:
        U, S, Vh = torch.linalg.svd(wide, full_matrices=False)
        left, right = (U * S.unsqueeze(-2))[..., :rank].mT, Vh[..., :rank, :]
    else:
        # W V V^H with orthonormal V is exact at full rank, however inaccurate the small eigenvalues are.
        vectors = leading(small_gram(wide), rank).flip(-1)
        if blocks.shape[-1] <= blocks.shape[-2]:
            left, right = (wide @ vectors).mT, vectors.mH
        else:
            left, right = vectors.mT, vectors.mH @ wide
    return balanced(left, right)


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same products ``left^T right`` with rows of equal norm, and the largest entry of every right row positive."""
    norms = [torch.linalg.vector_norm(rows, dim=-1, keepdim=True) for rows in (left, right)]
    tiny = torch.finfo(norms[0].dtype).tiny
    root = norms[0].sqrt() / norms[1].clamp_min(tiny).sqrt()  # 0 where the block has a lower rank; never infinite
    pivot = right.gather(-1, right.abs().argmax(-1, keepdim=True)).sgn()
    safe = torch.where(root > 0, root, 1.0)
    return left * (pivot / safe), right * (pivot.conj() * root)
