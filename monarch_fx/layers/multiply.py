"""The product with a part of a MonarchWeight: by its factors, or by its dense values where no piece has that part."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from monarch_fx.errors import DenseFallbackWarning, StructureError
from monarch_fx.kernels import autocast
from monarch_fx.kernels.op import monarch_bmm, monarch_grouped_mm
from monarch_fx.layers.match import find_piece
from monarch_fx.rules import Multiply
from monarch_fx.structure import MonarchShape
from monarch_fx.views import MatrixView

if TYPE_CHECKING:
    from monarch_fx.layers.dense_like import DenseLike, WeightView

Cut = tuple["int | None", "int | None"]

# What products read of a weight besides its factors: the fields of its StridedView; for each piece those of its
# MatrixView, and its cut. Plain tuples, since these Dynamo guards as one, and objects field by field.
Outline = tuple[tuple[Any, ...], tuple[tuple[Any, ...], ...], tuple["Cut | None", ...]]


def cut(shape: MonarchShape | None) -> Cut | None:
    """``out_features`` and ``in_features`` of a product, where the grid pads them; None for a dense piece."""
    if shape is None:
        return None
    return (shape.out_features, shape.in_features) if shape.padded else (None, None)


def multiplier(operand: WeightView, matrix: MatrixView) -> Multiply:
    """The product with the piece of the weight that ``matrix`` names; with the dense values where none fits."""
    root, index = operand.root, operand.index
    _, views, cuts = root.outline
    match = find_piece([MatrixView(*view) for view in views], matrix)
    if match is None:
        if index is not None:
            raise StructureError("A view of a Monarch weight that the plan doesn't know is indexed at run time.")
        warn_dense(operand, "a product with an unplanned view")
        dense = root.to_dense_root().reshape(-1).as_strided(*matrix.strided)
        batch = (matrix.batch_size,) if matrix.batch else ()
        dense = dense.reshape(*batch, matrix.out_features, matrix.in_features)
        return lambda x, bias=None, *, offs=None: _dense_product(x, _read(operand, dense, None), bias, offs)
    suffix, sizes = root.suffix(match.piece), cuts[match.piece]
    picks = match.element if match.element is not None else index

    def multiply(x: Any, bias: Any = None, *, offs: Any = None) -> Any:
        if match.rows is None:
            y = product(x, bias, offs)
        else:
            y = product(x)[..., match.rows]
            y = y if bias is None else y + bias
        return y if root.observer is None else root.observer(match, x, y)

    def product(x: Any, bias: Any = None, offs: Any = None) -> Any:
        if sizes is None:
            dense = _read(operand, getattr(root, f"dense{suffix}"), picks)
            return _dense_product(widened(x, dense), dense.mT if match.flipped else dense, bias, offs)
        R = _read(operand, getattr(root, f"R{suffix}"), picks)
        L = _read(operand, getattr(root, f"L{suffix}"), picks)
        if match.flipped:  # the transposed matrix has the same factors, in the other order
            R, L = L, R
        out, features = reversed(sizes) if match.flipped else sizes
        x = widened(taken(x, features), R)
        if offs is not None:
            return monarch_grouped_mm(x, R, L, offs, out_features=out)
        return monarch_bmm(x, R, L, bias, out_features=out, recompute=root.recompute)

    return multiply


def warn_dense(operand: DenseLike, name: str) -> None:
    """Says aloud that the factors are multiplied out, since it costs what they save."""
    if not torch.compiler.is_compiling():
        warnings.warn(
            f"A Monarch weight of shape {tuple(operand.shape)} is multiplied out, because {name!r} reads it. The "
            "result is right, but not fast: exclude this weight from monarchify, or call its layer instead.",
            DenseFallbackWarning,
            stacklevel=4,
        )


def _read(operand: WeightView, factor: Any, picks: Any) -> Any:
    """A factor, or dense values, as a view of the weight reads them."""
    factor = factor.detach() if operand.detached else factor
    factor = factor if picks is None else factor[picks]
    return factor if operand.cast is None else factor.to(operand.cast)


def widened(x: Any, factor: Any) -> Any:
    """A half-precision activation that meets float32 factors is widened (T5 keeps ``wo`` in float32)."""
    if isinstance(x, fx.Proxy) or autocast.dtype(x) == autocast.dtype(factor):
        return x
    return x.to(factor.dtype) if torch.promote_types(x.dtype, factor.dtype) == factor.dtype else x


def taken(x: Any, features: int | None) -> Any:
    """x with as many features as a padded matrix takes: the factors alone would take a few more, or fewer.

    Raises:
        StructureError: They are not as many.
    """
    if features is not None and not isinstance(x, fx.Proxy) and x.shape[-1] != features:
        raise StructureError(f"The matrix takes {features} input features, got x of shape {tuple(x.shape)}.")
    return x


def _dense_product(x: Any, dense: Any, bias: Any, offs: Any) -> Any:
    if offs is not None:
        return torch.nn.functional.grouped_mm(x, dense.mT, offs=offs)
    y = torch.matmul(x, dense.mT)
    return y if bias is None else y + bias
