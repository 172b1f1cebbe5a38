"""The Monarch matrix itself: mathematics only."""

from __future__ import annotations

from dataclasses import dataclass

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
