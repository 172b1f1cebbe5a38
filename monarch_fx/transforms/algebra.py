"""Changes of a Monarch matrix that leave it one: rows and columns scaled or reordered, another dtype, the real part."""

from __future__ import annotations

import torch
from torch import Tensor

from monarch_fx.structure import Monarch


def scaled(monarch: Monarch, rows: Tensor | None = None, columns: Tensor | None = None) -> Monarch:
    """``diag(rows) W diag(columns)``; vectors (out_features,) and (in_features,)."""
    R = monarch.R if columns is None else monarch.R * _placed(columns, monarch.input_permutation, monarch.R)
    L = monarch.L if rows is None else monarch.L * _placed(rows, monarch.output_permutation, monarch.L)
    return _like(monarch, R, L)


def reordered(monarch: Monarch, rows: Tensor | None = None, columns: Tensor | None = None) -> Monarch:
    """``W[rows][:, columns]``; permutations of all rows and columns."""
    return Monarch(
        monarch.R,
        monarch.L,
        monarch.in_features,
        monarch.out_features,
        input_permutation=_ordered(monarch.input_permutation, monarch.in_features, columns),
        output_permutation=_ordered(monarch.output_permutation, monarch.out_features, rows),
    )


def real_part(monarch: Monarch) -> Monarch:
    """Re W, a real Monarch matrix of twice the rank: Re(L^T R) = Re(L)^T Re(R) - Im(L)^T Im(R)."""
    R, L = monarch.R, monarch.L
    return _like(monarch, torch.cat([R.real, R.imag], dim=-2), torch.cat([L.real, -L.imag], dim=-2))


def cast(monarch: Monarch, dtype: torch.dtype, device: torch.device | str | None) -> Monarch:
    R, L = (factor.to(device, dtype) for factor in (monarch.R, monarch.L))
    return _like(monarch, R, L)


def _like(monarch: Monarch, R: Tensor, L: Tensor) -> Monarch:
    """Other factors with the same sizes and permutations."""
    places = (monarch.input_permutation, monarch.output_permutation)
    inputs, outputs = (None if p is None else p.to(R.device) for p in places)
    return Monarch(
        R, L, monarch.in_features, monarch.out_features, input_permutation=inputs, output_permutation=outputs
    )


def _placed(values: Tensor, permutation: Tensor | None, factor: Tensor) -> Tensor:
    """A value per feature -> a value per place of the grid, (blocks, 1, 1, size)."""
    blocks, size = factor.shape[0], factor.shape[-1]
    places = torch.arange(len(values), device=values.device) if permutation is None else permutation
    return values.new_zeros(blocks * size).index_copy(0, places, values).view(blocks, 1, 1, size)


def _ordered(permutation: Tensor | None, features: int, order: Tensor | None) -> Tensor | None:
    if order is None:
        return permutation
    return (torch.arange(features, device=order.device) if permutation is None else permutation)[order]
