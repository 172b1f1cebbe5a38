"""The Monarch matrix itself: mathematics only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from monarch_fx.errors import StructureError


@dataclass(frozen=True)
class MonarchShape:
    """Size, grid and rank of one Monarch matrix W (out, in), ``W[j, k] = L[j, k] @ R[j, k]``.

    The grid has ``nblocks_out x nblocks_in`` blocks of (s, p) entries; sizes that it doesn't divide are padded, and
    ``params`` counts the padding.

    Raises:
        StructureError: A field is not a positive integer, or a grid has more blocks than the matrix has rows or
            columns.
    """

    in_features: int
    out_features: int
    nblocks_out: int = 1
    nblocks_in: int = 1
    rank: int = 1

    def __post_init__(self) -> None:
        for name in ("in_features", "out_features", "nblocks_out", "nblocks_in", "rank"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise StructureError(f"MonarchShape.{name} must be a positive integer, got {value!r}.")
        if self.nblocks_in > self.in_features or self.nblocks_out > self.out_features:
            raise StructureError(
                f"A grid of {self.nblocks_out}x{self.nblocks_in} blocks doesn't fit a matrix with "
                f"out_features={self.out_features} and in_features={self.in_features}: use fewer blocks."
            )

    @property
    def p(self) -> int:
        """Columns of a block, padding included."""
        return -(-self.in_features // self.nblocks_in)

    @property
    def s(self) -> int:
        """Rows of a block, padding included."""
        return -(-self.out_features // self.nblocks_out)

    @property
    def params(self) -> int:
        """Stored numbers: ``nblocks_out * nblocks_in * rank * (p + s)``."""
        return self.nblocks_out * self.nblocks_in * self.rank * (self.p + self.s)

    @property
    def ratio(self) -> float:
        """Stored numbers over those of the dense matrix."""
        return self.params / (self.in_features * self.out_features)

    @property
    def padded(self) -> bool:
        return self.p * self.nblocks_in != self.in_features or self.s * self.nblocks_out != self.out_features

    def __str__(self) -> str:
        return f"{self.nblocks_out}x{self.nblocks_in} r{self.rank}"


class Monarch:
    """A Monarch matrix by its factors: ``W[j, k] = L[j, k]^T R[j, k]`` over a grid of blocks (Dao et al. 2022, section 3.1).

    Args:
        R: (nblocks_in, nblocks_out, rank, p), or (B, ...) for a batch of equal matrices.
        L: (nblocks_out, nblocks_in, rank, s), or (B, ...).
        in_features: Columns of W; default ``nblocks_in * p``; fewer where the grid pads.
        out_features: Rows of W; default ``nblocks_out * s``.
    """

    def __init__(self, R: Tensor, L: Tensor, in_features: int | None = None, out_features: int | None = None) -> None:
        self.R, self.L = R, L
        self.in_features = in_features or R.shape[-4] * R.shape[-1]
        self.out_features = out_features or L.shape[-4] * L.shape[-1]

    @property
    def shape(self) -> MonarchShape:
        n_out, n_in, rank, _ = self.L.shape[-4:]
        return MonarchShape(self.in_features, self.out_features, n_out, n_in, rank)

    def to_dense(self) -> Tensor:
        """W (out_features, in_features), or (B, out_features, in_features)."""
        dense = torch.einsum("...jkrs,...kjrp->...jskp", self.L, self.R).flatten(-2).flatten(-3, -2)
        return dense[..., : self.out_features, : self.in_features]
