"""Optimizer state of factors -> that of their product, block by block.

With W = L^T R in a block and G the gradient at W, the factors have gradients G_R = L G and G_L = R G^T. All sums and
inverses are over single blocks; the stored layouts are those of ``monarch_fx.Monarch``: R (k, j, rank, p),
L (j, k, rank, s), with a batch dimension before them or none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from monarch_fx.structure import Monarch, MonarchShape

# Directions in which a factor is smaller than this, against its largest, hardly reach its partner's gradient; what is
# averaged over steps has drifted by more than that.
NEGLIGIBLE = 1e-3


def first_moment(shape: MonarchShape, R: Tensor, L: Tensor, at_R: Tensor, at_L: Tensor) -> Tensor:
    """The smallest G, in Frobenius norm, with L G = at_R and R G^T = at_L; (out, in), or (B, out, in).

    It is the projection of the gradient at W onto the tangent space of the blocks of that rank: what the factors could
    see of it. The part that both equations tell is the mean of the two, which matters where they disagree, as averages
    over steps with moving factors do.
    """
    R, L = _real(R, shape.in_features), _real(L, shape.out_features)
    R_inverse, L_inverse = (torch.linalg.pinv(factor, rtol=NEGLIGIBLE).mT for factor in (R, L))
    only_R = at_R - 0.5 * (at_R @ R_inverse.mT) @ R
    only_L = at_L - 0.5 * (at_L @ L_inverse.mT) @ L
    return _dense(shape, only_R, L_inverse) + _dense(shape, R_inverse, only_L)


def second_moment(shape: MonarchShape, R: Tensor, L: Tensor, at_R: Tensor, at_L: Tensor) -> Tensor:
    """Mean squares of the entries of G from those of L G and R G^T; (out, in), or (B, out, in).

    Of rank one in each block, E[G_oi^2] = u_o w_i, as in Adafactor (Shazeer and Stern 2018, arXiv 1804.04235). Entries
    taken as uncorrelated give at_R = (L^2 u) w^T and at_L = (R^2 w) u^T: sums over the rank have the shape of w and u,
    and two estimates of the scale, of which the geometric mean is taken. In training, gradients lean towards the
    directions that the factors have, and the scale comes out too large, by about 2 for 4x4 blocks and 5 for low rank
    (benchmark ``densify``): the first steps are smaller than Adam's own, not larger.
    """
    columns, rows = at_R.sum(-2, keepdim=True), at_L.sum(-2, keepdim=True)  # (k, j, 1, p), (j, k, 1, s)
    R, L = _real(R, shape.in_features), _real(L, shape.out_features)
    tiny = torch.finfo(R.dtype).tiny
    column_scale = (R.square() * columns).sum((-2, -1), keepdim=True).clamp_min(tiny).sqrt()
    row_scale = (L.square() * rows).sum((-2, -1), keepdim=True).clamp_min(tiny).sqrt()
    return _dense(shape, columns / column_scale, rows / row_scale)


def _real(factor: Tensor, features: int) -> Tensor:
    """The factor with zeros where the grid pads: no gradient reaches those entries."""
    blocks, width = factor.shape[-4], factor.shape[-1]
    real = torch.arange(blocks * width, device=factor.device).view(blocks, 1, 1, width) < features
    return torch.where(real, factor, 0)


def _dense(shape: MonarchShape, R: Tensor, L: Tensor) -> Tensor:
    return Monarch(R, L, shape.in_features, shape.out_features).to_dense()
