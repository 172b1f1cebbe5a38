"""monarch_bmm: the op's schema, its FLOP formula and the checks of its arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from monarch_fx.errors import StructureError
from monarch_fx.kernels.reference import grouped_reference, reference

_LIBRARY = torch.library.Library("monarch_fx", "DEF")
_LIBRARY.define("monarch_bmm(Tensor x, Tensor R, Tensor L, Tensor? bias=None, *, SymInt? out_features=None) -> Tensor")
_LIBRARY.define("monarch_grouped_mm(Tensor x, Tensor R, Tensor L, Tensor offs, *, SymInt? out_features=None) -> Tensor")
_LIBRARY.impl("monarch_bmm", reference, "CompositeImplicitAutograd")
_LIBRARY.impl("monarch_grouped_mm", grouped_reference, "CompositeImplicitAutograd")


def monarch_bmm(x: Tensor, R: Tensor, L: Tensor, bias: Tensor | None = None, *, out_features: int | None = None) -> Tensor:
    """Multiplies rows with a Monarch matrix: ``y_j = sum_k L[j, k] (R[j, k] x_k) + bias_j`` (DESIGN: grid form).

    Args:
        x: (*, in_features); with batched factors (B, tokens, in_features).
        R: (nblocks_in, nblocks_out, rank, p), or (B, nblocks_in, nblocks_out, rank, p).
        L: (nblocks_out, nblocks_in, rank, s), or with the same B in front.
        bias: Added to the result: (out_features,), or anything that broadcasts to it.
        out_features: Rows of the matrix where the grid pads it; default ``nblocks_out * s``.

    Returns:
        (*, out_features).

    Raises:
        StructureError: The factors disagree, ``x`` doesn't fit them, or dtypes differ outside autocast.
    """
    if not any(isinstance(t, fx.Proxy) for t in (x, R, L)):
        _check(x, R, L)
    return torch.ops.monarch_fx.monarch_bmm(x, R, L, bias, out_features=out_features)


def monarch_grouped_mm(x: Tensor, R: Tensor, L: Tensor, offs: Tensor, *, out_features: int | None = None) -> Tensor:
    """Rows sorted by expert times one Monarch matrix per expert.

    Args:
        x: (rows, in_features), sorted by expert.
        R: (E, nblocks_in, nblocks_out, rank, p).
        L: (E, nblocks_out, nblocks_in, rank, s).
        offs: (E,) int32, where each expert's rows end, as in ``torch.nn.functional.grouped_mm``.
        out_features: As for ``monarch_bmm``.

    Returns:
        (rows, out_features).

    Raises:
        StructureError: As ``monarch_bmm``.
    """
    if not any(isinstance(t, fx.Proxy) for t in (x, R, L)):
        _check(x, R, L)
    return torch.ops.monarch_fx.monarch_grouped_mm(x, R, L, offs, out_features=out_features)


def _check(x: Any, R: Any, L: Any) -> None:
    if R.dim() not in (4, 5) or L.dim() != R.dim():
        raise StructureError(
            f"R must be (nblocks_in, nblocks_out, rank, p) and L (nblocks_out, nblocks_in, rank, s), both with or without "
            f"a batch dimension; got {tuple(R.shape)} and {tuple(L.shape)}."
        )
    if (R.shape[-4], R.shape[-3], R.shape[-2]) != (L.shape[-3], L.shape[-4], L.shape[-2]):
        raise StructureError(f"R {tuple(R.shape)} and L {tuple(L.shape)} disagree in grid or rank.")
    width = R.shape[-4] * R.shape[-1]
    if x.dim() == 0 or x.shape[-1] > width or x.shape[-1] <= width - R.shape[-4]:
        raise StructureError(f"x of shape {tuple(x.shape)} doesn't fit factors for {width} input features.")
