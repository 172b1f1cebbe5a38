"""Which piece of a weight a product reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from monarch_fx.views import MatrixView


@dataclass(frozen=True)
class Match:
    """Where a product's matrix lies in a weight: piece, orientation, element of its batch, slice of its rows."""

    piece: int
    flipped: bool = False
    element: int | None = None
    rows: slice | None = None


def find_piece(pieces: Sequence[MatrixView], matrix: MatrixView) -> Match | None:
    """Where ``matrix`` lies among the pieces; None where no piece has it."""
    for i, view in enumerate(pieces):
        if matrix == view:
            return Match(i)
        if matrix == view.transposed:
            return Match(i, flipped=True)
    for i, view in enumerate(pieces):
        match = None if matrix.batch else (_element(i, matrix, view) or _rows(i, matrix, view))
        if match is not None:
            return match
    return None


def _element(piece: int, matrix: MatrixView, view: MatrixView) -> Match | None:
    """One matrix of a batch: an expert that the model's own code picks."""
    if len(view.batch) != 1:
        return None
    size, stride = view.batch[0]
    element, remainder = divmod(matrix.offset - view.offset, stride)
    if remainder or not 0 <= element < size:
        return None
    if (matrix.out, matrix.inp) == (view.out, view.inp):
        return Match(piece, element=element)
    if (matrix.inp, matrix.out) == (view.out, view.inp):
        return Match(piece, flipped=True, element=element)
    return None


def _rows(piece: int, matrix: MatrixView, view: MatrixView) -> Match | None:
    """Some rows of a piece: packed attention weights, planned as one product, that a call splits."""
    if view.batch or len(view.out) != 1 or len(matrix.out) != 1 or matrix.inp != view.inp:
        return None
    (size, stride), (all_rows, all_stride) = matrix.out[0], view.out[0]
    start, remainder = divmod(matrix.offset - view.offset, stride)
    if remainder or stride != all_stride or start < 0 or start + size > all_rows:
        return None
    return Match(piece, rows=slice(start, start + size))
